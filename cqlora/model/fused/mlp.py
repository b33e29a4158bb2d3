"""The gated feed-forward block of LLaMA (SwiGLU, 2002.05202) over fused LoRA layers: less kept, less redone.

The stock block keeps all four tensors of the intermediate size for the backward pass. Two are enough: the
activation and the product follow from the gate and the up projection, element by element. And nothing is
kept from the block's last matrix product, so that activation checkpointing, which recomputes a layer only as
far as something was kept, leaves it out: a quarter of a layer's matrix products.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.smollm3.modeling_smollm3 import SmolLM3MLP

from cqlora.model.fused import plain
from cqlora.model.fused.linear import (
    AdaptedMatrix,
    FusedLinear,
    FusedLinear4bit,
    cast_input,
    has_one_unmerged_adapter,
    multiply_into,
    multiply_scaled,
)

_GATED = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP, SmolLM3MLP)
"""Blocks of one arithmetic under several names, so that one class stands for all."""


def fuse_mlps(model: nn.Module, elementwise: Any = plain) -> int:
    """Give the lean forward to every block whose three layers `fuse_lora_linears` fused; return how many.

    `elementwise` is the module whose functions do what is no matrix product: `plain`, or `kernels`.
    """
    fused = 0
    for module in model.modules():
        if type(module) in _GATED and _is_plain(module):
            module.__class__ = FusedMLP
            module.elementwise = elementwise
            fused += 1
    return fused


def _is_plain(mlp: Any) -> bool:
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return mlp.config.hidden_act == "silu" and all(isinstance(layer, FusedLinear | FusedLinear4bit) for layer in layers)


class FusedMLP(LlamaMLP):
    """down(silu(gate(x)) * up(x)), keeping x, gate(x), up(x) and the three projections to `rank` columns."""

    elementwise: Any = plain

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if not all(has_one_unmerged_adapter(layer) for layer in layers):
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        x = cast_input(x)
        gate, up, down = (AdaptedMatrix.of_layer(layer) for layer in layers)
        product, inner = _GatedProduct.apply(  # type: ignore[no-untyped-call]
            x, gate.a, gate.b, up.a, up.b, down.a, gate, up, down, self.elementwise
        )
        # In this order: what the low-rank product keeps is the last thing kept.
        low_rank = _LowRankProduct.apply(inner, down.b, down)  # type: ignore[no-untyped-call]
        output = _FrozenProduct.apply(product, low_rank, down)  # type: ignore[no-untyped-call]
        return output.view(x.shape)  # type: ignore[no-any-return]


class _GatedProduct(torch.autograd.Function):
    """silu(gate(x)) * up(x) as (N, intermediate), and its scaled projection (N, r) by the down layer's `a`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        *ctx.layers, ctx.elementwise = arguments[5:]
        gate, up, down = ctx.layers
        ctx.shape = x.shape
        flat = x.reshape(-1, x.shape[-1])
        gate_output, inner_gate = gate.multiply(flat)
        up_output, inner_up = up.multiply(flat)
        product = ctx.elementwise.multiply_gate(gate_output, up_output)
        ctx.save_for_backward(flat, gate_output, up_output, inner_gate, inner_up)
        return product, multiply_scaled(product, down.adapter(product.dtype)[0].T, down.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_product: Tensor, grad_inner: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_output, up_output, inner_gate, inner_up = ctx.saved_tensors
        gate, up, down = ctx.layers
        grad_inner = grad_inner * down.scale
        # In place, since nobody else has it: it comes from `_FrozenProduct`.
        grad_product = grad_product.addmm_(grad_inner, down.adapter(grad_inner.dtype)[0])
        product, grad_gate, grad_up = ctx.elementwise.differentiate_gate(grad_product, gate_output, up_output)
        grad_down_a = multiply_into(down.a.dtype, grad_inner.T, product)
        del product
        *grads_up, grad_inner_up = up.adapter_gradients(grad_up, x, inner_up)
        *grads_gate, grad_inner_gate = gate.adapter_gradients(grad_gate, x, inner_gate)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = up.add_input_gradient(grad_up, grad_inner_up)
            grad_x = gate.add_input_gradient(grad_gate, grad_inner_gate, grad_x).view(ctx.shape)
        return grad_x, *grads_gate, *grads_up, grad_down_a, None, None, None, None


class _LowRankProduct(torch.autograd.Function):
    """The down layer's `inner` (N, r) times its `b`, keeping `inner` only."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, b: Tensor, layer: AdaptedMatrix) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(inner)
        return inner @ layer.adapter(inner.dtype)[1].T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (inner,) = ctx.saved_tensors
        return grad @ ctx.layer.adapter(grad.dtype)[1], multiply_into(ctx.layer.b.dtype, grad.T, inner), None


class _FrozenProduct(torch.autograd.Function):
    """`added` and, in place, x W^T on top with the frozen W of a layer, keeping nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, layer: AdaptedMatrix) -> Tensor:
        ctx.layer = layer
        ctx.mark_dirty(added)
        added.addmm_(x, layer.dense(x.dtype).T)
        return added if layer.base.bias is None else added.add_(layer.base.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad @ ctx.layer.dense(grad.dtype), grad, None
