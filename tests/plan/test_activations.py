"""What the planner says that a block keeps, against what autograd really keeps."""

from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from cqlora.config.schema import LoraConfig, ModelConfig
from cqlora.model.attention import DOCUMENTS, document_kwargs
from cqlora.model.fused import fuse_blocks
from cqlora.model.tiny import llama_config
from cqlora.plan.activations import kept_per_token
from cqlora.plan.program import Program
from cqlora.plan.shapes import block_matrices
from tests.plan.runs import small_model

DOCUMENT_LENGTHS = [96, 160]
WIDE = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}
ON_CPU = Program(compute_bytes=4, attention_copies=2, mask_bytes=4)


@pytest.mark.parametrize(
    ("shape", "lora", "program", "dtype"),
    [
        ({}, {}, {}, torch.float32),
        (WIDE, {}, {}, torch.float32),
        ({"num_key_value_heads": 4}, {}, {}, torch.float32),
        ({"num_hidden_layers": 4}, {"rank": 64}, {}, torch.float32),
        ({}, {"target_modules": ["q_proj", "v_proj"]}, {}, torch.float32),
        ({}, {"dropout": 0.1}, {"dropout": True}, torch.float32),
        (WIDE, {}, {"compute_bytes": 2, "adapter_copies_input": True}, torch.bfloat16),
        (WIDE, {"dropout": 0.1}, {"compute_bytes": 2, "dropout": True}, torch.bfloat16),
    ],
)
def test_kept_bytes_are_those_that_autograd_keeps(
    shape: dict[str, Any], lora: dict[str, Any], program: dict[str, Any], dtype: torch.dtype
) -> None:
    model, adapter = small_model(**shape), LoraConfig(**lora)
    planned = kept_per_token(model, adapter, replace(ON_CPU, **program))
    planned *= model.num_hidden_layers * sum(DOCUMENT_LENGTHS)
    kept = count_kept_bytes(build_adapted(model, adapter, dtype), dtype, autocast=dtype is not torch.float32)
    assert planned == pytest.approx(kept, rel=0.08)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, WIDE, {"num_hidden_layers": 4}])
def test_kept_bytes_of_fused_layers_are_those_that_autograd_keeps(shape: dict[str, Any], dtype: torch.dtype) -> None:
    model, adapter = small_model(**shape), LoraConfig()
    lean = replace(ON_CPU, lean_mlp=True, compute_bytes=dtype.itemsize)
    planned = kept_per_token(model, adapter, lean) * model.num_hidden_layers * sum(DOCUMENT_LENGTHS)
    adapted = build_adapted(model, adapter, dtype)
    assert fuse_blocks(adapted)
    assert planned == pytest.approx(count_kept_bytes(adapted, dtype, autocast=False), rel=0.08)


def build_adapted(shape: ModelConfig, lora: LoraConfig, dtype: torch.dtype) -> nn.Module:
    """The shape as a quantised, adapted model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(shape, attn_implementation=DOCUMENTS)).to(dtype)
    model.requires_grad_(False)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, quantize(linear, dtype))
    targets = list(block_matrices(shape)) if lora.target_modules == ["all"] else lora.target_modules
    adapted: nn.Module = get_peft_model(
        model, PeftLoraConfig(r=lora.rank, target_modules=targets, lora_dropout=lora.dropout)
    )
    return adapted.train()


def quantize(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """The layer in NF4."""
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype)
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


def count_kept_bytes(adapted: Any, dtype: torch.dtype, autocast: bool) -> int:
    """Bytes of every tensor that a forward pass keeps, each storage once, parameters and buffers left out."""
    length = sum(DOCUMENT_LENGTHS)
    own = {t.untyped_storage().data_ptr() for t in (*adapted.parameters(), *adapted.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.numel() > 1:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mixed = torch.autocast("cpu", dtype=dtype, enabled=autocast)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), mixed:
        adapted.get_base_model().model(
            input_ids=torch.zeros(1, length, dtype=torch.int64),
            position_ids=torch.cat([torch.arange(n) for n in DOCUMENT_LENGTHS])[None],
            use_cache=False,
            **document_kwargs(DOCUMENT_LENGTHS, "cpu"),
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
