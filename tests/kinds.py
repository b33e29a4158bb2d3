"""Random models of every kind that trains, with what sets each kind apart, small enough to run in a moment."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.weights.adapters import write_tiny_base

SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": 0,
    "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 32}],
    "mistral": [{"sliding_window": None, "head_dim": 32}],
    "qwen2": [{}, {"tie_word_embeddings": True}],
    "qwen3": [{"head_dim": 32}, {"head_dim": 32, "attention_bias": True}],
    "smollm3": [{}, {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True}],
}
"""Options that a kind's layers compute with; the first of each kind are those that most of its models have."""
VARIANTS = [(kind, options) for kind, every in OPTIONS.items() for options in every]


def write_kind(kind: str, folder: Path, **options: Any) -> Path:
    """A random model of a kind in float32, whose biases, norms and positions matter, with a tiny base's tokenizer."""
    config = AutoConfig.for_model(kind, **(SHAPE | OPTIONS[kind][0] | options))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        # Untrained scores are so small that a wrong attention would hardly show.
        parameter.data = parameter.data * 8 if parameter.dim() == 2 else parameter.data + 0.2 * torch.randn(
            parameter.shape
        )  # fmt: skip
    model.save_pretrained(folder)
    plain = folder.with_name(f"{folder.name}-plain")
    write_tiny_base(plain)
    for file in plain.iterdir():
        if not (folder / file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    shutil.rmtree(plain)
    return folder
