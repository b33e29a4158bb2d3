"""What the rows of new tokens start from: functions of the base's own rows, computed in float32.

`subpiece_mean`: the mean of the rows of the pieces that the base would have used. `mean`: that of all rows.
`sampled`: drawn with the old rows' mean and covariance (Hewitt, "Initializing New Word Embeddings for Pretrained
Language Models", 2021). `weighted`: the sub-pieces' mean in which a piece counts the less the more new tokens share
it, drawn towards the base's own Chinese rows; docs/vocabulary.md has the formula and the
measurements. `distilled` rows start as `weighted` ones; weights/distill.py fits them.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cqlora.vocab.config import RowInit

_BLOCK_ROWS = 1024
_COMMON_SHARE = 0.01
"""Share of all sub-pieces at which a piece counts half as much as a rare one (`weighted`)."""
_ANCHOR_SHARE = 0.3
"""Share of the base's mean Chinese row in a new piece's row (`weighted`)."""


@dataclass(frozen=True, slots=True)
class NewTokens:
    """New tokens as the base spells them."""

    subpieces: list[list[int]]
    """For each new token, the base's ids of its text; never empty."""
    pieces: int
    """How many of them, the first, are pieces of text; the others are control tokens."""
    chinese_ids: list[int]
    """The base's own tokens that hold a Chinese character."""

    def __len__(self) -> int:
        return len(self.subpieces)


def initial_rows(base: torch.Tensor, used: int, new: NewTokens, init: RowInit, seed: int) -> Iterator[torch.Tensor]:
    """Rows for new tokens, float32 blocks of [n, hidden].

    Args:
        base: the embedding matrix, [rows, hidden], of any float type; it may be memory-mapped.
        used: how many of its rows the base's tokens use.
        new: the new tokens.
        init: what the rows start from.
        seed: of `sampled`.
    """
    shares = subpiece_shares(new.subpieces) if init in (RowInit.weighted, RowInit.distilled) else {}
    for start in range(0, len(new), _BLOCK_ROWS):
        block = new.subpieces[start : start + _BLOCK_ROWS]
        match init:
            case RowInit.mean:
                yield mean_row(base, used).expand(len(block), -1)
            case RowInit.sampled:
                yield sample_rows(base, used, len(block), seed + start)
            case RowInit.subpiece_mean:
                yield weighted_rows(base, [[1.0] * len(ids) for ids in block], block)
            case RowInit.weighted | RowInit.distilled:
                weights = [[_COMMON_SHARE / (_COMMON_SHARE + shares[i]) for i in ids] for ids in block]
                rows = weighted_rows(base, weights, block)
                yield draw_towards(rows, base, new.chinese_ids, max(0, new.pieces - start))


def subpiece_shares(subpieces: list[list[int]]) -> dict[int, float]:
    """For each sub-piece, its share among all the sub-pieces of the new tokens."""
    counts = Counter(token_id for ids in subpieces for token_id in ids)
    total = counts.total()
    return {token_id: count / total for token_id, count in counts.items()}


def draw_towards(rows: torch.Tensor, base: torch.Tensor, anchors: list[int], count: int) -> torch.Tensor:
    """The first `count` rows moved towards the mean of the base's `anchors`, float32 [n, hidden]."""
    if anchors and count:
        anchor = weighted_rows(base, [[1.0] * len(anchors)], [anchors])
        rows[:count] = (1 - _ANCHOR_SHARE) * rows[:count] + _ANCHOR_SHARE * anchor
    return rows


def weighted_rows(base: torch.Tensor, weights: list[list[float]], subpieces: list[list[int]]) -> torch.Tensor:
    """Weighted means of rows, float32 [n, hidden]; weights need not sum to one."""
    lengths = [len(ids) for ids in subpieces]
    flat_ids = torch.tensor([token_id for ids in subpieces for token_id in ids])
    flat_weights = torch.tensor([weight for row in weights for weight in row])
    owner = torch.repeat_interleave(torch.arange(len(subpieces)), torch.tensor(lengths))
    rows = torch.zeros(len(subpieces), base.shape[1])
    rows.index_add_(0, owner, base[flat_ids].float() * flat_weights[:, None])
    total = torch.zeros(len(subpieces)).index_add_(0, owner, flat_weights)
    return rows / total[:, None]


def mean_row(base: torch.Tensor, used: int) -> torch.Tensor:
    """The mean of the rows in use, float32 [hidden]."""
    total = torch.zeros(base.shape[1])
    for block in torch.split(base[:used], _BLOCK_ROWS):
        total += block.float().sum(0)
    return total / used


def sample_rows(base: torch.Tensor, used: int, count: int, seed: int) -> torch.Tensor:
    """`count` draws from a normal distribution with the mean and covariance of the rows in use.

    A combination of the centred rows with normal coefficients of variance 1/used has their covariance, so no
    hidden × hidden matrix is formed or factorised.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = mean_row(base, used)
    drawn = mean.repeat(count, 1)
    for block in torch.split(base[:used], _BLOCK_ROWS):
        coefficients = torch.randn(count, block.shape[0], generator=generator) / used**0.5
        drawn += coefficients @ (block.float() - mean)
    return drawn
