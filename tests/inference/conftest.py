"""Small bases with and without adapters, as a run would leave them."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from cqlora.base import read_base
from cqlora.config import ModelConfig
from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.model.adapters import adapter_state, save_adapter
from cqlora.model.tiny import build_tiny

TEXTS = ["长江是亚洲最长的河流。", "The Yangtze is the longest river in Asia."] * 20
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_base(folder: Path, tied: bool = False, seed: int = 0) -> Path:
    """A random base whose matrices have shapes that the fused kernel takes."""
    shape = ModelConfig(
        name="tiny", path=str(folder), vocab_size=448, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied,
    )  # fmt: skip
    return build_tiny(shape, TEXTS, CHAT_TEMPLATE, seed)


def build_adapter(base: Path, folder: Path, trained_on: str = "none", **options) -> Path:
    """A random adapter of a base, with a card."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=TARGETS, **options)
    adapted: PeftModel = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                parameter.normal_(std=0.2)
    save_adapter(adapted, folder, read_base(base), adapter_state(adapted), describe(trained_on))
    return folder


def describe(quantization: str) -> dict:
    """How a run would say that it trained."""
    return {"quantization": quantization, "double_quantization": True, "dtype": "float32", "method": "lora"}


def peft_model(base: Path, adapter: Path, **options) -> PeftModel:
    """transformers and PEFT on the same folders."""
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    return PeftModel.from_pretrained(loaded, adapter).eval()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return build_base(tmp_path_factory.mktemp("inference") / "base")


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory) -> Path:
    return build_adapter(base, tmp_path_factory.mktemp("inference") / "adapter")


@pytest.fixture(scope="session")
def nf4_adapter(base, tmp_path_factory) -> Path:
    return build_adapter(base, tmp_path_factory.mktemp("inference") / "nf4_adapter", trained_on="nf4")


@pytest.fixture(scope="session")
def merged(base, adapter, tmp_path_factory) -> Path:
    """PEFT's own merge of the adapter, in float32."""
    folder = tmp_path_factory.mktemp("inference") / "merged"
    peft_model(base, adapter).merge_and_unload().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).is_file():
            (folder / name).write_bytes((base / name).read_bytes())
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


