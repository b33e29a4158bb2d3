"""RMSNorm (1910.07467) as one operation of torch's, which keeps its input and one number a token.

transformers' forward keeps the input in float32 as well, and is six operators with three casts. On a GPU torch's is a
kernel each way.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

_STOCK = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm)
"""Norms with one and the same formula."""


def fuse_norms(model: nn.Module) -> int:
    """Give torch's forward to every norm of a known kind; return how many there are."""
    fused = 0
    for module in model.modules():
        if type(module) in _STOCK:
            module.__class__ = FusedRMSNorm
            fused += 1
    return fused


class FusedRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 within."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
