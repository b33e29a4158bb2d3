"""What new rows start from, recomputed in float64."""

import pytest
import torch

from cqlora.vocab.config import RowInit
from cqlora.vocab.rows import NewTokens, initial_rows, mean_row, weighted_rows

BASE = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
SUBPIECES = [[3], [4, 5], [6, 7, 8, 6]]


CHINESE_IDS = [10, 11]


def rows(init: RowInit, base: torch.Tensor = BASE, used: int = 50, subpieces: list[list[int]] = SUBPIECES):
    """All the new rows of one way; the last token is a control token."""
    new = NewTokens(subpieces, len(subpieces) - 1, CHINESE_IDS)
    return torch.cat(list(initial_rows(base, used, new, init, seed=1)))


def test_subpiece_mean_is_the_mean_of_the_pieces_rows() -> None:
    expected = torch.stack([BASE[ids].double().mean(0) for ids in SUBPIECES])
    torch.testing.assert_close(rows(RowInit.subpiece_mean).double(), expected, rtol=1e-6, atol=1e-6)


def test_weighted_rows_count_shared_pieces_less_and_lean_on_the_chinese_rows() -> None:
    subpieces = [[3, 4], [3, 5, 5], [3, 6]]
    share = {3: 3 / 7, 4: 1 / 7, 5: 2 / 7, 6: 1 / 7}
    chinese = BASE[CHINESE_IDS].double().mean(0)
    for row, ids, lean in zip(rows(RowInit.weighted, subpieces=subpieces), subpieces, (0.3, 0.3, 0.0), strict=True):
        weights = torch.tensor([0.01 / (0.01 + share[i]) for i in ids], dtype=torch.float64)
        mean = (weights[:, None] * BASE[ids].double()).sum(0) / weights.sum()
        torch.testing.assert_close(row.double(), (1 - lean) * mean + lean * chinese, rtol=1e-5, atol=1e-6)


def test_weighted_rows_of_a_base_without_chinese_are_the_weighted_mean_alone() -> None:
    new = NewTokens([[3], [4]], 2, [])
    found = torch.cat(list(initial_rows(BASE, 50, new, RowInit.weighted, seed=1)))
    torch.testing.assert_close(found, BASE[[3, 4]])


def test_mean_leaves_unused_rows_out() -> None:
    base = BASE.clone()
    base[40:] = 1e6
    expected = base[:40].double().mean(0)
    torch.testing.assert_close(rows(RowInit.mean, base, 40)[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_sampled_rows_have_the_mean_and_covariance_of_the_old_ones() -> None:
    base = BASE @ torch.randn(8, 8, generator=torch.Generator().manual_seed(2)) + 3
    drawn = rows(RowInit.sampled, base, 50, [[1]] * 40_000)
    centred = (base - base.mean(0)).double()
    expected = centred.T @ centred / 50
    found = torch.cov(drawn.double().T)
    assert (drawn.mean(0) - base.mean(0)).abs().max() < 0.1
    assert (found - expected).norm() / expected.norm() < 0.05


def test_sampled_rows_differ_from_one_another_and_repeat_with_the_seed() -> None:
    drawn = rows(RowInit.sampled, BASE, 50, [[1]] * 2000)
    assert len(torch.unique(drawn, dim=0)) == 2000
    assert torch.equal(drawn, rows(RowInit.sampled, BASE, 50, [[1]] * 2000))


@pytest.mark.parametrize("init", list(RowInit))
def test_large_float16_rows_give_no_overflow_and_single_pieces_no_nan(init: RowInit) -> None:
    base = torch.full((4000, 8), 60_000.0, dtype=torch.float16)
    found = rows(init, base, 4000, [[1], [2, 3], [5] * 40])
    assert torch.isfinite(found.half()).all()
    torch.testing.assert_close(found, torch.full_like(found, 60_000.0))


def test_blocks_join_to_the_same_rows() -> None:
    many = SUBPIECES * 1000
    found = rows(RowInit.subpiece_mean, BASE, 50, many)
    assert torch.equal(found[:3], found[-3:])
    assert found.shape == (3000, 8)


def test_mean_row_is_accumulated_in_float32() -> None:
    base = torch.full((3000, 2), 32_768.0, dtype=torch.float16)
    assert mean_row(base, 3000).tolist() == [32_768.0, 32_768.0]


def test_weights_need_not_sum_to_one() -> None:
    found = weighted_rows(BASE, [[2.0, 6.0]], [[0, 1]])
    torch.testing.assert_close(found[0], 0.25 * BASE[0] + 0.75 * BASE[1])
