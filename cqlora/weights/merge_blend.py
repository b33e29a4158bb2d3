"""Shares of what adapters add: one adapter scaled (WiSE-FT, 2109.01903), several averaged as what they add and not
as factors, since mean(B)·mean(A) is not mean(B·A) (2507.17634)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from cqlora.weights.merge_changes import Change, LowRank, RowFeed, RowStream


@dataclass(frozen=True, slots=True)
class Blend:
    """M + share · Σ (Mᵢ − M), where Mᵢ is the matrix M after the i-th alternative's changes.

    The rows in `whole` belong to tokens that an extension added. What they were before training is a guess from other
    rows, so nothing is kept of it: they are the mean of the Mᵢ, whatever the share.
    """

    alternatives: tuple[tuple[Change, ...], ...]
    share: float
    whole: range

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See Change."""
        return all(change.fits(shape) for changes in self.alternatives for change in changes)

    def apply(self, rows: RowStream) -> RowStream:
        """See Change."""
        return lambda: self._mix(rows)

    def equals(self, other: Change) -> bool:
        """See Change."""
        if not isinstance(other, Blend) or (self.share, self.whole) != (other.share, other.whole):
            return False
        shapes = [[len(changes) for changes in blend.alternatives] for blend in (self, other)]
        pairs = zip(_flat(self), _flat(other), strict=False)
        return shapes[0] == shapes[1] and all(mine.equals(its) for mine, its in pairs)

    def _mix(self, rows: RowStream) -> Iterator[torch.Tensor]:
        feeds, first = [RowFeed(_apply_all(changes, rows)()) for changes in self.alternatives], 0
        for block in rows():
            added = torch.zeros_like(block)
            for feed in feeds:
                added += feed.take(len(block)) - block
            shares = torch.full((len(block), *[1] * (block.dim() - 1)), self.share)
            start, stop = (min(max(edge - first, 0), len(block)) for edge in (self.whole.start, self.whole.stop))
            shares[start:stop] = 1 / len(feeds)
            first += len(block)
            yield block.addcmul_(added, shares)


def blend(alternatives: list[list[Change]], weight: float, whole: range) -> list[Change]:
    """The changes that add `weight` times the mean of what each alternative adds; rows in `whole` the mean itself."""
    if len(alternatives) == 1 and weight == 1:
        return alternatives[0]
    changes, share = [change for each in alternatives for change in each], weight / len(alternatives)
    sums = [change for change in changes if isinstance(change, LowRank) and change.magnitude is None]
    if len(sums) == len(changes) and not whole:
        # Sums need no copy of the matrix: each product is added with its share.
        return [replace(change, scaling=change.scaling * share) for change in sums]
    return [Blend(tuple(map(tuple, alternatives)), share, whole)]


def _apply_all(changes: tuple[Change, ...], rows: RowStream) -> RowStream:
    for change in changes:
        rows = change.apply(rows)
    return rows


def _flat(mixed: Blend) -> list[Change]:
    return [change for changes in mixed.alternatives for change in changes]
