"""Small bases and random adapters of every kind, written by transformers and PEFT."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from cqlora.config.schema import ModelConfig
from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.model.tiny import build_tiny
from tests.cards import drop_card

TEXTS = ["长江是亚洲最长的河流。", "The Yangtze is the longest river in Asia."] * 20
IDS = torch.arange(40, 140)[None]


def write_tiny_base(folder: Path, tied: bool = False, positions: int = 256) -> Path:
    """A random LLaMA of two layers in float32, with grouped queries."""
    shape = ModelConfig(
        name="tiny", path=str(folder), vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions, tie_word_embeddings=tied,
    )  # fmt: skip
    return drop_card(build_tiny(shape, TEXTS, CHAT_TEMPLATE))


def load(folder: Path, **options: Any) -> Any:
    """A model folder in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def write_adapter(base: Path, folder: Path, seed: int = 1, embeddings: bool = False, **options: Any) -> Path:
    """An adapter of PEFT's own writing whose every weight is random and matters."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **options))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        model.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


def attach(base: Any, adapter: Path) -> Any:
    """The adapter beside its base, unmerged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, adapter).eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits of every place, [places, vocabulary]."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0].float()
