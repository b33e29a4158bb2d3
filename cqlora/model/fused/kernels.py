"""What `plain` does, as one kernel each, by Triton: a pass over memory instead of three to ten.

They compute in float32 and round once, where torch's operators round after each. They are torch operators too, so that
they run on tensors without numbers and are counted as what they are.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS_PER_PROGRAM = 1024
_LIBRARY = torch.library.Library("cqlora", "DEF")


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """As `plain.dequantize`, scales that are quantised themselves (double quantisation) read on the way."""
    nested = state.state2 if state.nested else None
    scales = (nested.absmax, nested.code, state.offset) if nested else (None, None, None)
    sizes = (state.blocksize, nested.blocksize if nested else 1)
    matrix: Tensor = torch.ops.cqlora.dequantize(
        packed.view(torch.uint8), state.absmax, state.code, *scales, *sizes, state.shape, state.dtype
    )
    return matrix


def multiply_gate(gate: Tensor, up: Tensor) -> Tensor:
    """As `plain.multiply_gate`."""
    product: Tensor = torch.ops.cqlora.multiply_gate(gate, up)
    return product


def differentiate_gate(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `plain.differentiate_gate`."""
    product, grad_gate = torch.ops.cqlora.differentiate_gate(grad, gate, up)
    return product, grad_gate, grad


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> None:
    """As `plain.rotate`."""
    torch.ops.cqlora.rotate(query, key, cos, sin, back)


@triton.jit
def _dequantize(
    packed, absmax, table, absmax_scale, absmax_table, offset, matrix, count,
    GROUP: tl.constexpr, ABSMAX_GROUP: tl.constexpr, NESTED: tl.constexpr, SIZE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < count
    byte = tl.load(packed + at, mask=there, other=0).to(tl.int32)
    group = at // GROUP
    if NESTED:
        level = tl.load(absmax + group, mask=there, other=0).to(tl.int32)
        scale = tl.load(absmax_table + level) * tl.load(absmax_scale + group // ABSMAX_GROUP, mask=there, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + group, mask=there, other=0.0)
    # The first number of a byte is in its upper half.
    pair = tl.join(tl.load(table + (byte >> 4)) * scale, tl.load(table + (byte & 15)) * scale)
    tl.store(matrix + 2 * at[:, None] + tl.arange(0, 2)[None, :], pair, mask=there[:, None])


@triton.jit
def _multiply_gate(gate, up, product, count, SIZE: tl.constexpr):  # noqa: N803
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < count
    g = tl.load(gate + at, mask=there).to(tl.float32)
    u = tl.load(up + at, mask=there).to(tl.float32)
    tl.store(product + at, g / (1 + tl.exp(-g)) * u, mask=there)


@triton.jit
def _differentiate_gate(grad, gate, up, product, grad_gate, count, SIZE: tl.constexpr):  # noqa: N803
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < count
    slope = tl.load(grad + at, mask=there).to(tl.float32)
    g = tl.load(gate + at, mask=there).to(tl.float32)
    u = tl.load(up + at, mask=there).to(tl.float32)
    open_share = 1 / (1 + tl.exp(-g))
    active = g * open_share
    tl.store(product + at, active * u, mask=there)
    tl.store(grad_gate + at, slope * u * open_share * (1 + g * (1 - open_share)), mask=there)
    tl.store(grad + at, slope * active, mask=there)


@triton.jit
def _turn_heads(states, c, s, row, heads, HALF: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr):  # noqa: N803
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    there = (head < heads) & (pair < HALF)
    first = states + row * heads * 2 * HALF + head * 2 * HALF + pair
    x = tl.load(first, mask=there).to(tl.float32)
    y = tl.load(first + HALF, mask=there).to(tl.float32)
    tl.store(first, x * c - y * s, mask=there)
    tl.store(first + HALF, y * c + x * s, mask=there)


@triton.jit
def _rotate(
    query, key, cos, sin, rows, query_heads, key_heads,
    BACK: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    angle = (row % rows) * 2 * HALF + pair
    c = tl.load(cos + angle, mask=pair < HALF).to(tl.float32)
    s = tl.load(sin + angle, mask=pair < HALF).to(tl.float32)
    if BACK:
        s = -s
    _turn_heads(query, c, s, row, query_heads, HALF, HEADS, PAIRS)
    _turn_heads(key, c, s, row, key_heads, HALF, HEADS, PAIRS)


def _launch_dequantize(
    packed: Tensor, absmax: Tensor, table: Tensor, absmax_scale: Tensor | None, absmax_table: Tensor | None,
    offset: Tensor | None, group: int, absmax_group: int, shape: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    matrix = torch.empty(shape, dtype=dtype, device=packed.device)
    with _on_device_of(packed):
        _dequantize[_programs(packed)](
            packed, absmax, table, absmax_scale, absmax_table, offset, matrix, packed.numel(),
            group // 2, absmax_group, absmax_scale is not None, _NUMBERS_PER_PROGRAM,
        )  # fmt: skip
    return matrix


def _launch_multiply_gate(gate: Tensor, up: Tensor) -> Tensor:
    product = torch.empty_like(gate)
    with _on_device_of(gate):
        _multiply_gate[_programs(gate)](gate, up, product, gate.numel(), _NUMBERS_PER_PROGRAM)
    return product


def _launch_differentiate_gate(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    product, grad_gate = torch.empty_like(gate), torch.empty_like(gate)
    with _on_device_of(gate):
        _differentiate_gate[_programs(gate)](
            grad, gate, up, product, grad_gate, gate.numel(), _NUMBERS_PER_PROGRAM
        )  # fmt: skip
    return product, grad_gate


def _launch_rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    half = cos.shape[-1] // 2
    heads = [states.shape[-1] // (2 * half) for states in (query, key)]
    blocks = triton.next_power_of_2(max(heads)), triton.next_power_of_2(half)
    with _on_device_of(query):
        _rotate[(len(query),)](query, key, cos, sin, len(cos), *heads, back, half, *blocks)


def _programs(tensor: Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), _NUMBERS_PER_PROGRAM),)


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton starts its programs on the current GPU, which under `layers` need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _register() -> None:
    """Make each launcher a torch operator, with what it gives for tensors without numbers."""
    pair = "(Tensor, Tensor)"
    _LIBRARY.define(
        "dequantize(Tensor packed, Tensor absmax, Tensor table, Tensor? absmax_scale, Tensor? absmax_table, "
        "Tensor? offset, int group, int absmax_group, int[] shape, ScalarType dtype) -> Tensor"
    )
    _LIBRARY.define("multiply_gate(Tensor gate, Tensor up) -> Tensor")
    _LIBRARY.define(f"differentiate_gate(Tensor(a!) grad, Tensor gate, Tensor up) -> {pair}")
    _LIBRARY.define("rotate(Tensor(a!) query, Tensor(b!) key, Tensor cos, Tensor sin, bool back) -> ()")
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl("dequantize", _launch_dequantize, device)
        _LIBRARY.impl("multiply_gate", _launch_multiply_gate, device)
        _LIBRARY.impl("differentiate_gate", _launch_differentiate_gate, device)
        _LIBRARY.impl("rotate", _launch_rotate, device)
    register_fake = torch.library.register_fake
    register_fake(
        "cqlora::dequantize",
        lambda packed, *rest: torch.empty(rest[-2], dtype=rest[-1], device=packed.device), lib=_LIBRARY,
    )  # fmt: skip
    register_fake("cqlora::multiply_gate", lambda gate, up: torch.empty_like(gate), lib=_LIBRARY)
    register_fake(
        "cqlora::differentiate_gate", lambda grad, gate, up: (torch.empty_like(gate), torch.empty_like(gate)),
        lib=_LIBRARY,
    )  # fmt: skip
    register_fake("cqlora::rotate", lambda query, key, cos, sin, back: None, lib=_LIBRARY)


_register()
