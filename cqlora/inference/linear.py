"""The matrices of a decoder in the forms that it computes with, each a function from activations to activations."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from cqlora.inference.kernel import fused_nf4_product
from cqlora.inference.proof import NativeCall, is_proven
from cqlora.system.processor import packs_bfloat16

ROW_STEP = 16
"""oneDNN makes and keeps a bfloat16 kernel of over half a megabyte for each number of rows that a matrix meets: prompts
of every length would make a server grow by hundreds of megabytes, so they are met in steps of this."""


PACKED = NativeCall("oneDNN's product by packed matrices", "torch", "cqlora.inference.checks:check_packed")


class Linear(Protocol):
    """A linear layer."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(tokens, in) to (tokens, out)."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A matrix as it is."""

    weight: torch.Tensor
    """(out, in)."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """See Linear."""
        rows = len(inputs)
        typed = _in_steps(inputs.to(self.weight.dtype))
        return F.linear(typed, self.weight)[:rows].to(inputs.dtype)


@dataclass(frozen=True, slots=True)
class Packed:
    """A bfloat16 matrix in oneDNN's own order: half the time of one as it is, wherever a row's numbers are the same."""

    weight: torch.Tensor
    """(out, in), of torch's mkldnn layout."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """See Linear."""
        rows = len(inputs)
        typed = _in_steps(inputs.to(torch.bfloat16))
        outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(typed, self.weight, None, "none", [], "")
        return outputs[:rows].to(inputs.dtype)


@dataclass(frozen=True, slots=True)
class AdapterTerm:
    """What an adapter adds to a quantised matrix, which cannot be merged into it exactly; in the activations' type."""

    down: torch.Tensor
    """(in, r): the A of every matrix that was joined, transposed, side by side."""
    up: torch.Tensor
    """(r, out): their scaled B, transposed, each beside zeros where the others' outputs are; or (n, r / n, out / n)
    without the zeros, where n matrices of one shape were joined."""
    row_scale: torch.Tensor | None
    """(out,): DoRA's magnitude over the norm of each merged row (2402.09353, section 4)."""

    def add_to(self, outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """The adapted layer's outputs from the quantised matrix' own."""
        between = torch.mm(inputs, self.down)
        if self.up.dim() == 2:
            outputs.addmm_(between, self.up)
        else:
            parts, rank, height = self.up.shape
            by_part = outputs.view(-1, parts, height).transpose(0, 1)
            by_part.baddbmm_(between.view(-1, parts, rank).transpose(0, 1), self.up)
        return outputs if self.row_scale is None else outputs * self.row_scale


@dataclass(frozen=True, slots=True)
class FusedNf4:
    """An NF4 matrix that the processor unpacks while it multiplies: a quarter of the bytes of bfloat16."""

    packed: torch.Tensor
    """uint8 (out, in / 2) in the kernel's order, see pack_for_kernel."""
    scales: torch.Tensor
    """bfloat16 (in / 64, out)."""
    low_rank: AdapterTerm | None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """See Linear; the product is of bfloat16 numbers."""
        outputs = fused_nf4_product(inputs.to(torch.bfloat16), self.packed, self.scales).to(inputs.dtype)
        return outputs if self.low_rank is None else self.low_rank.add_to(outputs, inputs)


@dataclass(frozen=True, slots=True)
class Biased:
    """A layer of another form with a bias on top."""

    product: Linear
    bias: torch.Tensor
    """(out,), in the activations' type."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """See Linear."""
        return self.product(inputs).add_(self.bias)


def pack_dense(linear: Linear) -> Linear:
    """The layer in oneDNN's own order, where it is of a kind that has one here; else as it is."""
    if isinstance(linear, Biased):
        return Biased(pack_dense(linear.product), linear.bias)
    if not isinstance(linear, Dense) or linear.weight.device.type != "cpu" or linear.weight.dtype != torch.bfloat16:
        return linear
    return pack_matrix(linear) if packs_bfloat16() and is_proven(PACKED) else linear


def pack_matrix(dense: Dense) -> Packed:
    """The bfloat16 matrix in oneDNN's own order."""
    return Packed(torch.ops.mkldnn._reorder_linear_weight(dense.weight, ROW_STEP))


def _in_steps(inputs: torch.Tensor) -> torch.Tensor:
    """(tokens, in) with as many empty rows below as make its rows a multiple of ROW_STEP; a few stay as they are."""
    if len(inputs) <= ROW_STEP or inputs.device.type != "cpu":
        return inputs
    return F.pad(inputs, (0, 0, 0, -len(inputs) % ROW_STEP))


def pack_for_kernel(packed: torch.Tensor) -> torch.Tensor:
    """NF4 bytes (out, in / 2) from bitsandbytes' order into that of its fused kernel.

    bitsandbytes keeps two neighbours of a row in a byte, the first in the high half. The kernel takes 32 rows at
    a time: for each pair of columns 16 rows' codes in the low halves of 32 bytes, the next 16 rows' in the high
    halves (bitsandbytes, functional.py, _convert_weight_packed_for_cpu).
    """
    rows, pairs = packed.shape
    codes = torch.stack([packed >> 4, packed & 0xF], dim=-1).view(rows // 32, 32, pairs, 2)
    codes = codes.transpose(1, 2).reshape(-1, 64)
    return (codes[:, 32:] << 4 | codes[:, :32]).view(rows, pairs)


def tensors_of(linear: Any) -> dict[str, torch.Tensor]:
    """The tensors of a Dense or FusedNf4 layer, with or without bias, by name; restore_linear makes it again."""
    found: dict[str, torch.Tensor] = {}
    for field in fields(linear):
        value = getattr(linear, field.name)
        if isinstance(value, torch.Tensor):
            found[field.name] = value
        elif value is not None:
            found |= {f"{field.name}.{name}": tensor for name, tensor in tensors_of(value).items()}
    return found


def restore_linear(tensors: Mapping[str, torch.Tensor]) -> Linear:
    """The layer that tensors_of took apart."""
    if "bias" in tensors:
        product = {name.removeprefix("product."): tensor for name, tensor in tensors.items() if name != "bias"}
        return Biased(restore_linear(product), tensors["bias"])
    if "weight" in tensors:
        return Dense(tensors["weight"])
    low_rank = None
    if "low_rank.down" in tensors:
        parts = (tensors.get(f"low_rank.{name}") for name in ("down", "up", "row_scale"))
        low_rank = AdapterTerm(*parts)  # type: ignore[arg-type]
    return FusedNf4(tensors["packed"], tensors["scales"], low_rank)
