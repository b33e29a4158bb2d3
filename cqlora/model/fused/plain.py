"""The element-by-element parts of a block in operators of torch and bitsandbytes, which run anywhere."""

from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """A matrix out of its 4-bit numbers and what bitsandbytes keeps to read them, a `QuantState`."""
    matrix: Tensor = dequantize_4bit(packed, state)
    return matrix


def multiply_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(`gate`) * `up`, both (N, intermediate)."""
    return F.silu(gate).mul_(up)


def differentiate_gate(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(`gate`) * `up` again, and the gradients of `gate` and `up` from the product's; `grad` is written over."""
    active = F.silu(gate)
    product = active * up
    grad_up = active.mul_(grad)
    return product, torch.ops.aten.silu_backward(grad.mul_(up), gate), grad_up


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> None:
    """Turn the heads of `query` (N, H * d) and `key` (N, K * d) by their positions' angles, in place.

    Rotary embeddings (RoFormer, 2104.09864, section 3.4.2) in LLaMA's order: number i of a head's first half makes
    a pair with number i of its second. `cos` and `sin` (R, d) hold a row for each token, over and over where N is a
    multiple of R; the second half of a row repeats the first. `back` turns the other way, which is how gradients go.
    """
    half, rows = cos.shape[-1] // 2, len(query) // len(cos)
    cos, sin = (angles[:, :half].repeat(rows, 1)[:, None] for angles in (cos, -sin if back else sin))
    for states in (query, key):
        first, second = states.view(len(states), -1, 2, half).unbind(2)
        turned = first * cos - second * sin, second * cos + first * sin
        first.copy_(turned[0])
        second.copy_(turned[1])
