"""The attention of LLaMA and its kin over fused LoRA layers: queries, keys and values in one operation.

The three projections share their input, so it is kept once and its gradient is added up in one tensor. Queries and keys
are turned by their positions in place, and their gradients turned back, where transformers' formula makes five tensors
of each.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention

from cqlora.model.fused import plain
from cqlora.model.fused.linear import (
    AdaptedMatrix,
    FusedLinear,
    FusedLinear4bit,
    cast_input,
    has_one_unmerged_adapter,
    multiply_adapted,
)


def fuse_attentions(model: nn.Module, elementwise: Any) -> int:
    """Give the fused forward to every attention whose projections `fuse_lora_linears` fused; return how many.

    `elementwise` is the module whose `rotate` is used. transformers' eager attention keeps the stock forward.
    """
    fused = 0
    for module in model.modules():
        kind = _FUSED.get(type(module))
        if kind is not None and _is_fusible(module):
            module.__class__ = kind
            module.elementwise = elementwise
            fused += 1
    return fused


def _is_fusible(module: Any) -> bool:
    layers = (module.q_proj, module.k_proj, module.v_proj)
    known = module.config._attn_implementation in ALL_ATTENTION_FUNCTIONS
    return known and all(isinstance(layer, FusedLinear | FusedLinear4bit) for layer in layers)


class _FusedAttention:
    """What the fused classes share; the stock forward is next in line."""

    elementwise: Any = plain

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if past_key_values is not None or not all(has_one_unmerged_adapter(layer) for layer in layers):
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        matrices = [AdaptedMatrix.of_layer(layer) for layer in layers]
        query, key, value = multiply_adapted(cast_input(hidden_states), matrices)
        query, key = self.turn(query, key, position_embeddings)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attend(
            self,
            *(states.view(heads).transpose(1, 2) for states in (query, key, value)),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self.window(),
            **kwargs,
        )
        return self.o_proj(output.flatten(-2)), weights

    def turn(
        self: Any, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys as they attend, turned by their positions."""
        cos, sin = (angles.view(-1, self.head_dim) for angles in position_embeddings or ())
        query, key = _Rotation.apply(query, key, cos, sin, self.elementwise)  # type: ignore[no-untyped-call]
        return query, key

    def window(self) -> dict[str, Any]:
        """What the stock forward tells the attention of a sliding window."""
        return {}


class FusedLlamaAttention(_FusedAttention, LlamaAttention):
    """LLaMA's attention."""


class FusedMistralAttention(_FusedAttention, MistralAttention):
    """Mistral's attention."""

    def window(self) -> dict[str, Any]:
        """The model's one window."""
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class _FusedAttentionOfLayers(_FusedAttention):
    """Of models whose layers may have different windows."""

    def window(self: Any) -> dict[str, Any]:
        """The layer's window."""
        return {"sliding_window": self.sliding_window}


class FusedQwen2Attention(_FusedAttentionOfLayers, Qwen2Attention):
    """Qwen 2's attention, whose projections have biases."""


class FusedQwen3Attention(_FusedAttentionOfLayers, Qwen3Attention):
    """Qwen 3's attention, which normalises the queries and keys of each head."""

    def turn(
        self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Normalised before they are turned."""
        heads = (*query.shape[:-1], -1, self.head_dim)
        return super().turn(self.q_norm(query.view(heads)), self.k_norm(key.view(heads)), position_embeddings)


class FusedSmolLM3Attention(_FusedAttentionOfLayers, SmolLM3Attention):
    """SmolLM3's attention, in some of whose layers a position counts for nothing."""

    def turn(
        self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """As they are, where the layer has no rotary embedding."""
        return super().turn(query, key, position_embeddings) if self.use_rope else (query, key)


_FUSED: dict[type, Any] = {
    LlamaAttention: FusedLlamaAttention,
    MistralAttention: FusedMistralAttention,
    Qwen2Attention: FusedQwen2Attention,
    Qwen3Attention: FusedQwen3Attention,
    SmolLM3Attention: FusedSmolLM3Attention,
}


class _Rotation(torch.autograd.Function):
    """Queries (N, H * d) and keys (N, K * d), or (N, H, d) and (N, K, d), turned by their positions, in place.

    See `plain.rotate`.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, elementwise: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.elementwise = elementwise
        ctx.mark_dirty(query, key)
        ctx.save_for_backward(cos, sin)
        elementwise.rotate(*map(_by_token, (query, key)), cos, sin)
        return query, key

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        # Turned in place: attention has made them for nobody else.
        grads = grad_query.contiguous(), grad_key.contiguous()
        ctx.elementwise.rotate(*map(_by_token, grads), *ctx.saved_tensors, back=True)
        return *grads, None, None, None


def _by_token(states: Tensor) -> Tensor:
    return states.view(len(states), -1)
