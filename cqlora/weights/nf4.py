"""A matrix in NF4 as bitsandbytes holds it (2305.14314, section 3), made and undone a few rows at a time.

The weights are scaled and rounded in groups of 64; double quantisation then rounds the groups' scales, which
needs all of them, so they and the packed halves of bytes are what is held of a matrix: a seventh of its 32 bits.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cqlora.system.shards import TensorSpec
from cqlora.weights.merge_changes import RowStream

GROUP, SCALE_GROUP = 64, 256
"""Numbers that share a scale, and scales that share one."""
_BLOCK_MATRIX = re.compile(r"model\.layers\.\d+\..+_proj\.weight")


@dataclass(frozen=True, slots=True)
class Nf4Format:
    """How matrices are quantised."""

    double_quantization: bool
    dtype: torch.dtype
    """The type that weights are rounded to before and come back in after; a run's compute type."""


def is_block_matrix(spec: TensorSpec) -> bool:
    """Whether transformers quantises this tensor: the blocks' linear layers, neither embedding nor output."""
    return len(spec.shape) == 2 and _BLOCK_MATRIX.fullmatch(spec.name) is not None


@dataclass(frozen=True, slots=True)
class Nf4Matrix:
    """A quantised matrix."""

    shape: tuple[int, ...]
    packed: torch.Tensor
    """uint8, [numbers / 2, 1]."""
    state: Any
    """bitsandbytes' QuantState."""

    def scales(self) -> torch.Tensor:
        """float32 [numbers / 64]: the groups' scales, also where they were rounded themselves."""
        from bitsandbytes.functional import dequantize_blockwise

        absmax: torch.Tensor = self.state.absmax
        if not self.state.nested:
            return absmax
        rounded: torch.Tensor = dequantize_blockwise(absmax, self.state.state2).float() + self.state.offset
        return rounded


def quantise(rows: RowStream, shape: tuple[int, ...], form: Nf4Format) -> Nf4Matrix:
    """Quantise a matrix whose rows are multiples of 64 numbers together, as bitsandbytes would the whole of it."""
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise

    packed, scales = [], []
    for block in regroup(rows(), shape[1]):
        codes, state = quantize_4bit(block.to(form.dtype), blocksize=GROUP, quant_type="nf4")
        packed.append(codes)
        scales.append(state.absmax)
    absmax, offset, nested = torch.cat(scales), None, None
    if form.double_quantization:
        offset = absmax.mean()
        absmax, nested = quantize_blockwise(absmax - offset, blocksize=SCALE_GROUP)
    state = QuantState(
        absmax=absmax, shape=torch.Size(shape), dtype=form.dtype, blocksize=GROUP, quant_type="nf4",
        code=get_4bit_type("nf4", device=absmax.device), offset=offset, state2=nested,
    )  # fmt: skip
    return Nf4Matrix(shape, torch.cat(packed), state)


def dequantise(matrix: Nf4Matrix) -> Iterator[torch.Tensor]:
    """The matrix's rows, as a forward pass sees them, in float32."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state, absmax = matrix.state, matrix.scales()
    columns = matrix.shape[1]
    step = rows_together(columns)
    for first in range(0, matrix.shape[0], step):
        rows = min(step, matrix.shape[0] - first)
        groups = slice(first * columns // GROUP, -(-(first + rows) * columns // GROUP))
        part = QuantState(
            absmax=absmax[groups], shape=torch.Size((rows, columns)), dtype=state.dtype, blocksize=GROUP,
            quant_type="nf4", code=state.code,
        )  # fmt: skip
        codes = matrix.packed[first * columns // 2 : (first + rows) * columns // 2]
        yield dequantize_4bit(codes, part).float()


def through_nf4(rows: RowStream, shape: tuple[int, ...], form: Nf4Format) -> RowStream:
    """A matrix quantised to NF4 and dequantised again."""
    return lambda: dequantise(quantise(rows, shape, form))


def rows_together(columns: int) -> int:
    """How many rows to quantise at once: whole groups, about four million numbers."""
    return max(GROUP, (4 << 20) // columns // GROUP * GROUP)


def regroup(blocks: Iterator[torch.Tensor], columns: int) -> Iterator[torch.Tensor]:
    """The same rows in blocks of whole groups, so that a group's scale is of all its numbers."""
    step, waiting = rows_together(columns), []
    held = 0
    for block in blocks:
        waiting.append(block)
        held += len(block)
        if held < step:
            continue
        joined = torch.cat(waiting)
        whole = held // step * step
        yield from joined[:whole].split(step)
        waiting, held = [joined[whole:]], held - whole
    if held:
        yield torch.cat(waiting)
