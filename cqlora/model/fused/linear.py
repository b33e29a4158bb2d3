"""LoRA on a frozen matrix as one operation, with its backward pass written by hand.

PEFT adds the low-rank product to the base's output as a chain of its own: a defensive copy of the output, the
product, its scaling and the sum are four tensors of the output's size, made and freed again in every layer.
Here the low-rank product is added to the output in place, and what is kept for the backward pass is the input
and its projection to `rank` columns. y = x W^T + s (x A^T) B^T (LoRA, 2106.09685, section 4.1; with W
dequantised where it is used, QLoRA, 2305.14314, equation 5).
"""

from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fuse_lora_linears(model: nn.Module) -> int:
    """Give every plain LoRA layer of `model` the fused forward; return how many there are.

    Modules, parameters and their names stay PEFT's own. A layer keeps the stock forward where it is more than
    y = x W^T + s (x A^T) B^T: with dropout, DoRA or another variant, a bias on the adapter, an 8-bit base, or
    several adapters; and in any call with the adapter off, merged or chosen per sample.
    """
    keep_trainable_layout(model)
    fused = 0
    for module in model.modules():
        kind = _FUSED.get(type(module))
        if kind is not None and _is_plain(module):
            module.__class__ = kind
            fused += 1
    return fused


def keep_trainable_layout(model: nn.Module) -> None:
    """Let 4-bit weights lie as they were quantised, whatever is evaluated.

    On a processor with AVX512-BF16, bitsandbytes turns them at the first evaluation into a layout that has no
    backward pass: training on from there, gradients below the layer are zero.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _is_plain(layer: Any) -> bool:
    """Whether a LoRA layer is a product with a frozen matrix plus one low-rank product."""
    base = layer.get_base_layer()
    return (
        (type(base) is nn.Linear or isinstance(base, Linear4bit))
        and len(layer.lora_A) == 1
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    )


class _FusedForward:
    """What the fused classes share; the stock forward is next in line."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not has_one_unmerged_adapter(self):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        layer = AdaptedMatrix.of_layer(self)
        return _LoraLinear.apply(cast_input(x), layer.a, layer.b, layer)  # type: ignore[no-any-return, no-untyped-call]


class FusedLinear(_FusedForward, lora.Linear):  # type: ignore[misc]
    """PEFT's LoRA on `nn.Linear`, as one operation."""


class FusedLinear4bit(_FusedForward, lora.Linear4bit):  # type: ignore[misc]
    """PEFT's LoRA on a 4-bit matrix, as one operation."""


_FUSED: dict[type, Any] = {lora.Linear: FusedLinear, lora.Linear4bit: FusedLinear4bit}


def has_one_unmerged_adapter(layer: Any) -> bool:
    """Whether a fused layer, as it stands now, is a frozen matrix and its one adapter."""
    return (
        _is_plain(layer)
        and layer.active_adapters == list(layer.lora_A)
        and not layer.disable_adapters
        and not layer.merged
        and not layer.get_base_layer().weight.requires_grad
    )


def cast_input(x: Tensor) -> Tensor:
    """`x` in the type that matrix products compute in, which everything after it follows."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@dataclass(frozen=True, slots=True)
class AdaptedMatrix:
    """A frozen matrix W (out, in) and a low-rank one on top, as plain arithmetic outside autograd."""

    base: nn.Linear
    a: Tensor
    """(r, in)."""
    b: Tensor
    """(out, r)."""
    scale: float

    @classmethod
    def of_layer(cls, layer: Any) -> "AdaptedMatrix":
        """The arithmetic of a fused layer's only adapter."""
        (name,) = layer.lora_A
        return cls(layer.get_base_layer(), layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W in `dtype`."""
        weight = self.base.weight
        if isinstance(self.base, Linear4bit):
            # FSDP gathers the weight into a plain tensor; the module keeps what is needed to read it.
            state = getattr(weight, "quant_state", None) or self.base.quant_state
            weight = dequantize_4bit(weight, state)
        return weight.to(dtype)

    def multiply(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output (N, out) for `x` (N, in), and x A^T (N, r)."""
        inner = x @ self.a.to(x.dtype).T
        output = x @ self.dense(x.dtype).T
        if self.base.bias is not None:
            output += self.base.bias
        return output.addmm_(inner, self.b.to(x.dtype).T, alpha=self.scale), inner

    def adapter_gradients(self, grad: Tensor, x: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `a`, `b` and `inner` from the output's (N, out)."""
        grad_inner = (grad @ self.b.to(grad.dtype)).mul_(self.scale)
        grad_b = (grad.T @ inner).mul_(self.scale)
        return (grad_inner.T @ x).to(self.a.dtype), grad_b.to(self.b.dtype), grad_inner

    def add_input_gradient(self, grad: Tensor, grad_inner: Tensor, total: Tensor | None = None) -> Tensor:
        """`total` (N, in) and on top, in place, the gradient of the input from the output's (N, out)."""
        weight = self.dense(grad.dtype)
        total = grad @ weight if total is None else total.addmm_(grad, weight)
        return total.addmm_(grad_inner, self.a.to(grad.dtype))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: AdaptedMatrix) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        output, inner = layer.multiply(flat)
        ctx.layer = layer
        ctx.save_for_backward(flat, inner)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_a, grad_b, grad_inner = ctx.layer.adapter_gradients(flat, x, inner)
        if not ctx.needs_input_grad[0]:
            return None, grad_a, grad_b, None
        grad_x = ctx.layer.add_input_gradient(flat, grad_inner)
        return grad_x.view(*grad.shape[:-1], -1), grad_a, grad_b, None
