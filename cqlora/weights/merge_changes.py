"""What an adapter does to one matrix of the base, as functions from rows to rows in float32.

Rows come in blocks and are asked for again where a change needs two passes, so that no matrix is ever held
whole. The mathematics: LoRA 2106.09685, rsLoRA 2312.03732 (another scaling), DoRA 2402.09353 section 4.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from cqlora.system.shards import ShardReader

RowStream = Callable[[], Iterator[torch.Tensor]]
"""Gives the rows of a matrix from the first on, in blocks that are the taker's to change; every call begins anew."""


class Change(Protocol):
    """What one adapter does to one matrix."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be changed so."""

    def apply(self, rows: RowStream) -> RowStream:
        """The matrix after the change."""

    def equals(self, other: "Change") -> bool:
        """Whether `other` does the same to whatever matrix."""


class RowFeed:
    """Rows of a matrix as many at a time as are asked for, however the blocks that they come in are cut."""

    def __init__(self, blocks: Iterator[torch.Tensor]) -> None:
        self._blocks = blocks
        self._held: list[torch.Tensor] = []

    def take(self, count: int) -> torch.Tensor:
        """The next `count` rows, which the matrix must still have."""
        while sum(map(len, self._held)) < count:
            self._held.append(next(self._blocks))
        joined = self._held[0] if len(self._held) == 1 else torch.cat(self._held)
        self._held = [joined[count:]] if len(joined) > count else []
        return joined[:count]


@dataclass(frozen=True, slots=True)
class LowRank:
    """`scaling`·B·A added to a matrix; with a magnitude (DoRA) its rows, or columns, are then rescaled to it.

    A linear layer keeps A (r, in) and B (out, r); an embedding keeps them transposed, (r, rows) and (width, r),
    and its magnitude is of columns, since PEFT takes an embedding for a linear layer from ids to features.
    """

    reader: ShardReader
    up: str
    """Name of B of a linear layer, of A of an embedding."""
    down: str
    scaling: float
    magnitude: str | None
    of_embedding: bool

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, r) and (r, columns), in float32."""
        up, down = self.reader.read(self.up).float(), self.reader.read(self.down).float()
        return (up.T, down.T) if self.of_embedding else (up, down)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See Change."""
        up, down = self.reader.specs[self.up].shape, self.reader.specs[self.down].shape
        product = (up[1], down[0]) if self.of_embedding else (up[0], down[1])
        if self.magnitude is None:
            return product == shape
        return product == shape and self.reader.specs[self.magnitude].shape == (shape[int(self.of_embedding)],)

    def apply(self, rows: RowStream) -> RowStream:
        """See Change."""
        if self.magnitude is None:
            return lambda: self._add(rows())
        return self._rescale_columns(rows) if self.of_embedding else lambda: self._rescale_rows(rows)

    def equals(self, other: Change) -> bool:
        """See Change; an embedding's factors are compared with a linear layer's by what they stand for."""
        if not isinstance(other, LowRank) or self.magnitude or other.magnitude or self.scaling != other.scaling:
            return False
        return all(torch.equal(mine, its) for mine, its in zip(self.factors(), other.factors(), strict=True))

    def _add(self, blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        (up, down), first = self.factors(), 0
        for block in blocks:
            of_block = up[first : first + len(block)]
            yield block.addmm_(of_block.to(block.device), down.to(block.device), alpha=self.scaling)
            first += len(block)

    def _rescale_rows(self, rows: RowStream) -> Iterator[torch.Tensor]:
        magnitude, first = self._read_magnitude(), 0
        for block in self._add(rows()):
            norms = torch.linalg.norm(block, dim=1)
            yield block.mul_((magnitude[first : first + len(block)].to(block.device) / norms)[:, None])
            first += len(block)

    def _rescale_columns(self, rows: RowStream) -> RowStream:
        def rescaled() -> Iterator[torch.Tensor]:
            squares = sum(block.double().square().sum(dim=0) for block in self._add(rows()))
            assert isinstance(squares, torch.Tensor)
            factors = self._read_magnitude().to(squares.device) / squares.sqrt().float()
            for block in self._add(rows()):
                yield block.mul_(factors)

        return rescaled

    def _read_magnitude(self) -> torch.Tensor:
        assert self.magnitude is not None
        return self.reader.read(self.magnitude).float()


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Trained rows (trainable_token_indices) in place of the matrix's own."""

    reader: ShardReader
    name: str
    indices: tuple[int, ...]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See Change."""
        known = bool(self.indices) and min(self.indices) >= 0 and max(self.indices) < shape[0]
        return known and self.reader.specs[self.name].shape == (len(self.indices), *shape[1:])

    def apply(self, rows: RowStream) -> RowStream:
        """See Change."""
        return lambda: self._put(rows())

    def equals(self, other: Change) -> bool:
        """See Change."""
        if not isinstance(other, TokenRows) or self.indices != other.indices:
            return False
        return torch.equal(self.reader.read(self.name), other.reader.read(other.name))

    def _put(self, blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        values, indices, first = self.reader.read(self.name).float(), torch.tensor(self.indices), 0
        for block in blocks:
            here = (indices >= first) & (indices < first + len(block))
            yield block.index_copy_(0, (indices[here] - first).to(block.device), values[here].to(block.device))
            first += len(block)


@dataclass(frozen=True, slots=True)
class Replacement:
    """A tensor that the adapter holds whole (modules_to_save) in place of the base's."""

    reader: ShardReader
    name: str

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See Change."""
        return self.reader.specs[self.name].shape == shape

    def apply(self, rows: RowStream) -> RowStream:
        """See Change."""
        return lambda: (block.float() for block in self.reader.blocks(self.name))

    def equals(self, other: Change) -> bool:
        """See Change."""
        if not isinstance(other, Replacement):
            return False
        return torch.equal(self.reader.read(self.name), other.reader.read(other.name))
