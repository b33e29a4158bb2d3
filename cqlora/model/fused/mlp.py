"""The gated feed-forward block of LLaMA (SwiGLU, 2002.05202) over fused LoRA layers: less kept, less redone.

The stock block keeps all four tensors of the intermediate size for the backward pass. Two are enough: the
activation and the product follow from the gate and the up projection, element by element. And nothing is
kept from the block's last matrix product, so that activation checkpointing, which recomputes a layer only as
far as something was kept, leaves it out: a quarter of a layer's matrix products.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.smollm3.modeling_smollm3 import SmolLM3MLP

from cqlora.model.fused.linear import AdaptedMatrix, FusedLinear, FusedLinear4bit, cast_input, has_one_unmerged_adapter

_GATED = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP, SmolLM3MLP)
"""Blocks of one arithmetic under several names, so that one class stands for all."""


def fuse_mlps(model: nn.Module) -> int:
    """Give the lean forward to every block whose three layers `fuse_lora_linears` fused; return how many."""
    fused = 0
    for module in model.modules():
        if type(module) in _GATED and _is_plain(module):
            module.__class__ = FusedMLP
            fused += 1
    return fused


def _is_plain(mlp: Any) -> bool:
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return mlp.config.hidden_act == "silu" and all(isinstance(layer, FusedLinear | FusedLinear4bit) for layer in layers)


class FusedMLP(LlamaMLP):
    """down(silu(gate(x)) * up(x)), keeping x, gate(x), up(x) and the three projections to `rank` columns."""

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if not all(has_one_unmerged_adapter(layer) for layer in layers):
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        x = cast_input(x)
        gate, up, down = (AdaptedMatrix.of_layer(layer) for layer in layers)
        product, inner = _GatedProduct.apply(  # type: ignore[no-untyped-call]
            x, gate.a, gate.b, up.a, up.b, down.a, gate, up, down
        )
        # In this order: what the low-rank product keeps is the last thing kept.
        low_rank = F.linear(inner * down.scale, down.b.to(x.dtype))
        output = _FrozenProduct.apply(product, low_rank, down)  # type: ignore[no-untyped-call]
        return output.view(x.shape)  # type: ignore[no-any-return]


class _GatedProduct(torch.autograd.Function):
    """silu(gate(x)) * up(x) as (N, intermediate), and its projection (N, r) by the down layer's `a`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        gate, up, down = ctx.layers = arguments[5:]
        ctx.shape = x.shape
        flat = x.reshape(-1, x.shape[-1])
        gate_output, inner_gate = gate.multiply(flat)
        up_output, inner_up = up.multiply(flat)
        product = F.silu(gate_output).mul_(up_output)
        ctx.save_for_backward(flat, gate_output, up_output, inner_gate, inner_up)
        return product, product @ down.a.to(product.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_product: Tensor, grad_inner: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_output, up_output, inner_gate, inner_up = ctx.saved_tensors
        gate, up, down = ctx.layers
        active = F.silu(gate_output)
        grad_down_a = (grad_inner.T @ (active * up_output)).to(down.a.dtype)
        grad_product = torch.addmm(grad_product, grad_inner, down.a.to(grad_inner.dtype))
        grad_up = active.mul_(grad_product)
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up_output), gate_output)
        *grads_up, grad_inner_up = up.adapter_gradients(grad_up, x, inner_up)
        *grads_gate, grad_inner_gate = gate.adapter_gradients(grad_gate, x, inner_gate)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = up.add_input_gradient(grad_up, grad_inner_up)
            grad_x = gate.add_input_gradient(grad_gate, grad_inner_gate, grad_x).view(ctx.shape)
        return grad_x, *grads_gate, *grads_up, grad_down_a, None, None, None


class _FrozenProduct(torch.autograd.Function):
    """`added` + x W^T with the frozen W of a layer, keeping nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, layer: AdaptedMatrix) -> Tensor:
        ctx.layer = layer
        output = torch.addmm(added, x, layer.dense(x.dtype).T)
        return output if layer.base.bias is None else output.add_(layer.base.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad @ ctx.layer.dense(grad.dtype), grad, None
