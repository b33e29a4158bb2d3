"""What the rows of new tokens start from: functions of the base's own rows, computed in float32.

`subpiece_mean`: the mean of the rows of the pieces that the base would have used. `mean`: that of all rows.
`sampled`: drawn with the old rows' mean and covariance (Hewitt, "Initializing New Word Embeddings for Pretrained
Language Models", 2021). `weighted`: docs/vocabulary.md.
"""

from collections.abc import Iterator

import torch

from cqlora.vocab.config import RowInit

_BLOCK_ROWS = 1024


def initial_rows(
    base: torch.Tensor, used: int, subpieces: list[list[int]], init: RowInit, seed: int, output: bool
) -> Iterator[torch.Tensor]:
    """Rows for new tokens, float32 blocks of [n, hidden].

    Args:
        base: the embedding matrix, [rows, hidden], of any float type; it may be memory-mapped.
        used: how many of its rows the base's tokens use.
        subpieces: for each new token, the base's ids of its pieces; never empty.
        init: what the rows start from.
        seed: of `sampled`.
        output: whether the matrix gives logits (the only one or the second of two) rather than inputs alone.
    """
    for start in range(0, len(subpieces), _BLOCK_ROWS):
        block = subpieces[start : start + _BLOCK_ROWS]
        match init:
            case RowInit.mean:
                yield mean_row(base, used).expand(len(block), -1)
            case RowInit.sampled:
                yield sample_rows(base, used, len(block), seed + start)
            case RowInit.subpiece_mean:
                yield weighted_rows(base, [[1.0] * len(ids) for ids in block], block)
            case RowInit.weighted:
                yield weighted_rows(base, [position_weights(len(ids), output) for ids in block], block)


def position_weights(count: int, output: bool) -> list[float]:
    return [1.0] * count


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
