"""Layers whose forward and backward passes are written together, for the blocks that are plain enough."""

from peft.tuners.lora import LoraLayer
from torch import nn

from cqlora.model.fused.linear import fuse_lora_linears
from cqlora.model.fused.mlp import fuse_mlps


def fuse_blocks(model: nn.Module) -> bool:
    """Fuse what can be fused; return whether that is every adapted linear layer.

    Fused layers compute in the type of their input. PEFT's own take their input to the adapter's float32
    unless autocast keeps them from it, so a model that has any left wants autocast in 16 bits.
    """
    fused = fuse_lora_linears(model)
    fuse_mlps(model)
    adapted = sum(isinstance(module, LoraLayer) for module in model.modules())
    return fused == adapted
