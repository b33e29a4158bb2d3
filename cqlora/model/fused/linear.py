"""LoRA on a frozen matrix as one operation, with its backward pass written by hand.

PEFT adds the low-rank product to the base's output as a chain of its own: a defensive copy of the output, the
product, its scaling and the sum are four tensors of the output's size, made and freed again in every layer.
Here the low-rank product is added to the output in place, and what is kept for the backward pass is the input
and its projection to `rank` columns. y = x W^T + s (x A^T) B^T (LoRA, 2106.09685, section 4.1; with W
dequantised where it is used, QLoRA, 2305.14314, equation 5). Matrices that share their input are multiplied
together: it is kept once, and its gradient is added up in one tensor.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from cqlora.model.fused import plain


def fuse_lora_linears(model: nn.Module, elementwise: Any = plain) -> int:
    """Give every plain LoRA layer of `model` the fused forward; return how many there are.

    `elementwise` is the module whose `dequantize` is used: `plain`, or `kernels`.

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
            module.elementwise = elementwise
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

    elementwise: Any = plain
    cast_adapter: tuple[Tensor, Tensor] | None = None
    """A and B in the type that is computed in, while `adapters_cast_once` lasts."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not has_one_unmerged_adapter(self):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        (output,) = multiply_adapted(cast_input(x), [AdaptedMatrix.of_layer(self)])
        return output.view(*x.shape[:-1], -1)


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


def multiply_adapted(x: Tensor, matrices: "Sequence[AdaptedMatrix]") -> tuple[Tensor, ...]:
    """`x` (..., in) times each of the adapted matrices (out, in) that share it, as (N, out) each."""
    adapters = [weight for matrix in matrices for weight in (matrix.a, matrix.b)]
    return _AdaptedProducts.apply(x.reshape(-1, x.shape[-1]), matrices, *adapters)  # type: ignore[no-any-return, no-untyped-call]


@contextmanager
def adapters_cast_once(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it the fused layers of `model` multiply by copies of their adapters in `dtype`, made on entry.

    For passes between which no adapter changes: the micro batches of a step. What is sharded is left alone, since a
    layer's adapter is whole in its own forward and backward pass only.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, FusedLinear | FusedLinear4bit)]
    layers = [layer for layer in layers if has_one_unmerged_adapter(layer)]
    weights = [weight for layer in layers for weight in _adapter_of(layer)]
    if not weights or any(isinstance(weight, DTensor) or weight.dtype is dtype for weight in weights):
        yield
        return
    casts = [torch.empty_like(weight, dtype=dtype, requires_grad=False) for weight in weights]
    with torch.no_grad():
        torch._foreach_copy_(casts, weights)
    for number, layer in enumerate(layers):
        layer.cast_adapter = (casts[2 * number], casts[2 * number + 1])
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_adapter = None


def _adapter_of(layer: Any) -> tuple[Tensor, Tensor]:
    """A and B of a fused layer's only adapter."""
    (name,) = layer.lora_A
    return layer.lora_A[name].weight, layer.lora_B[name].weight


@dataclass(frozen=True, slots=True)
class AdaptedMatrix:
    """A frozen matrix W (out, in) and a low-rank one on top, as plain arithmetic outside autograd."""

    base: nn.Linear
    a: Tensor
    """(r, in)."""
    b: Tensor
    """(out, r)."""
    scale: float
    elementwise: Any
    """The module whose `dequantize` reads a W of 4 bits."""
    cast: tuple[Tensor, Tensor] | None = None
    """`a` and `b` in the type that is computed in, where they have been cast already."""

    @classmethod
    def of_layer(cls, layer: Any) -> "AdaptedMatrix":
        """The arithmetic of a fused layer's only adapter."""
        (name,) = layer.lora_A
        base, scale = layer.get_base_layer(), layer.scaling[name]
        return cls(base, *_adapter_of(layer), scale, layer.elementwise, layer.cast_adapter)

    def adapter(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`a` and `b` in `dtype`."""
        if self.cast is not None and self.cast[0].dtype is dtype:
            return self.cast
        return self.a.to(dtype), self.b.to(dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W in `dtype`."""
        weight = self.base.weight
        if isinstance(self.base, Linear4bit):
            # FSDP gathers the weight into a plain tensor; the module keeps what is needed to read it.
            state = getattr(weight, "quant_state", None) or self.base.quant_state
            weight = self.elementwise.dequantize(weight, state)
        return weight.to(dtype)

    def multiply(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output (N, out) for `x` (N, in), and s x A^T (N, r)."""
        a, b = self.adapter(x.dtype)
        inner = multiply_scaled(x, a.T, self.scale)
        output = x @ self.dense(x.dtype).T
        if self.base.bias is not None:
            output += self.base.bias
        return output.addmm_(inner, b.T), inner

    def adapter_gradients(self, grad: Tensor, x: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `a`, `b` and x A^T from the output's (N, out)."""
        grad_inner = multiply_scaled(grad, self.adapter(grad.dtype)[1], self.scale)
        return (
            multiply_into(self.a.dtype, grad_inner.T, x),
            multiply_into(self.b.dtype, grad.T, inner),
            grad_inner,
        )

    def add_input_gradient(self, grad: Tensor, grad_inner: Tensor, total: Tensor | None = None) -> Tensor:
        """`total` (N, in) and on top, in place, the gradient of the input from the output's (N, out)."""
        weight = self.dense(grad.dtype)
        total = grad @ weight if total is None else total.addmm_(grad, weight)
        return total.addmm_(grad_inner, self.adapter(grad.dtype)[0])


def multiply_scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """`scale` * `left` @ `right`, scaled within the product."""
    return left.new_empty(len(left), right.shape[1]).addmm_(left, right, beta=0, alpha=scale)


def multiply_into(dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    """`left` @ `right` in `dtype`; where that is float32, a GPU writes out the sums of 16-bit factors as they are."""
    if left.is_cuda and dtype is torch.float32 and left.dtype is not dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


class _AdaptedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Sequence[AdaptedMatrix], *adapters: Tensor) -> tuple[Tensor, ...]:
        outputs, inners = zip(*(matrix.multiply(x) for matrix in matrices), strict=True)
        ctx.matrices = matrices
        ctx.save_for_backward(x, *inners)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *inners = ctx.saved_tensors
        grad_x, of_adapters = None, []
        for matrix, inner, grad in zip(ctx.matrices, inners, grads, strict=True):
            grad_a, grad_b, grad_inner = matrix.adapter_gradients(grad, x, inner)
            of_adapters += [grad_a, grad_b]
            if ctx.needs_input_grad[0]:
                grad_x = matrix.add_input_gradient(grad, grad_inner, grad_x)
        return grad_x, None, *of_adapters
