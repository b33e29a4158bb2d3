"""Numbers come out of a page as they went in."""

import math

import numpy as np
import pytest

from cqlora.report.columns import pack_column, thin, unpack_column


def test_a_column_comes_back_as_it_was_written():
    values = [3.25, -1e-7, 7.5e9, None, math.nan, "nan", True, 10**400]
    back = unpack_column(pack_column("loss", values))
    np.testing.assert_array_equal(back, np.array([3.25, -1e-7, 7.5e9, *[math.nan] * 5], dtype=np.float32))


def test_counts_of_tokens_keep_their_last_digit():
    tokens = [2**40 + 1, 2**40 + 2]
    assert list(unpack_column(pack_column("tokens", tokens))) == tokens


def test_an_empty_column_is_empty():
    assert len(unpack_column(pack_column("loss", []))) == 0


def test_thinned_lines_are_means_of_their_neighbours_at_the_last_ones_step():
    rows = [{"kind": "train", "step": step, "loss": float(step), "tokens": 10 * step} for step in range(1, 11)]
    thinned = thin(rows, 5)
    assert [row["step"] for row in thinned] == [2, 4, 6, 8, 10]
    assert [row["loss"] for row in thinned] == [1.5, 3.5, 5.5, 7.5, 9.5]
    assert [row["tokens"] for row in thinned] == [20, 40, 60, 80, 100]
    assert thin(rows, 10) is rows


@pytest.mark.parametrize("lines", [1, 399, 400, 401, 1999])
def test_no_more_lines_are_left_than_asked_for_and_none_is_counted_twice(lines):
    rows = [{"step": step, "loss": 1.0 if step == lines else 0.0} for step in range(1, lines + 1)]
    thinned = thin(rows, 400)
    assert len(thinned) == min(lines, 400) and thinned[-1]["step"] == lines
    assert len({row["step"] for row in thinned}) == len(thinned)


def test_a_number_that_some_lines_lack_is_the_mean_of_the_others():
    rows = [{"step": 1, "loss/a/zh": 2.0}, {"step": 2}, {"step": 3, "loss/a/zh": math.inf}, {"step": 4}]
    first, second = thin(rows, 2)
    assert first["loss/a/zh"] == 2.0 and math.isnan(second["loss/a/zh"])
