"""Layers whose forward and backward passes are written together, for the blocks that are plain enough."""

import logging
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from cqlora.config.choices import Kernels
from cqlora.model.fused import plain
from cqlora.model.fused.attention import fuse_attentions
from cqlora.model.fused.linear import fuse_lora_linears
from cqlora.model.fused.mlp import fuse_mlps
from cqlora.model.fused.norm import fuse_norms

logger = logging.getLogger(__name__)


def fuse_blocks(model: nn.Module, kernels: Kernels = Kernels.plain) -> bool:
    """Fuse what can be fused; return whether that is every adapted linear layer.

    Fused layers compute in the type of their input. PEFT's own take their input to the adapter's float32
    unless autocast keeps them from it, so a model that has any left wants autocast in 16 bits.
    """
    elementwise: Any = plain
    if kernels is Kernels.triton:
        # Not above: it needs Triton, which machines without a GPU need not have.
        from cqlora.model.fused import kernels as elementwise
    fused = fuse_lora_linears(model, elementwise)
    fuse_mlps(model, elementwise)
    logger.info("blocks: %d adapted layers fused, kernels %s", fused, kernels.name)
    everything = fused == sum(isinstance(module, LoraLayer) for module in model.modules())
    # Under autocast torch's norm would give float32.
    if kernels is Kernels.triton and everything:
        fuse_norms(model)
        fuse_attentions(model, elementwise)
    return everything
