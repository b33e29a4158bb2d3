"""Small bases with and without adapters, as a run would leave them."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cqlora.base import read_base
from cqlora.config.schema import ModelConfig
from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.model.adapters import adapter_state, save_adapter
from cqlora.model.tiny import build_tiny
from tests.cards import drop_card

TEXTS = ["长江是亚洲最长的河流。", "The Yangtze is the longest river in Asia."] * 20
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_base(folder: Path, tied: bool = False, seed: int = 0) -> Path:
    """A random base whose matrices have shapes that the fused kernel takes."""
    shape = ModelConfig(
        name="tiny", path=str(folder), vocab_size=448, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied,
    )  # fmt: skip
    return drop_card(build_tiny(shape, TEXTS, CHAT_TEMPLATE, seed))


def build_adapter(base: Path, folder: Path, quantized: bool = False, **options) -> Path:
    """A random adapter of a base, with the card that a run writes."""
    torch.manual_seed(3)
    adapted = get_peft_model(
        load_stock(base, quantized),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **{"target_modules": TARGETS, **options}),
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(adapted, folder, read_base(base), adapter_state(adapted))
    return folder


def load_stock(folder: Path, quantized: bool = False):
    """transformers' model, its blocks in NF4 where asked for."""
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    options = {"quantization_config": how} if quantized else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, **options)


def peft_model(base: Path, adapter: Path, quantized: bool = False) -> PeftModel:
    """transformers and PEFT on the same folders, in the mode in which NF4 is computed in float32."""
    model = PeftModel.from_pretrained(load_stock(base, quantized), adapter)
    # In eval mode bitsandbytes computes in bfloat16 on processors that have it, whatever was asked for.
    return model.train() if quantized else model.eval()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return build_base(tmp_path_factory.mktemp("inference") / "base")


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory) -> Path:
    return build_adapter(base, tmp_path_factory.mktemp("inference") / "adapter")


@pytest.fixture(scope="session")
def nf4_adapter(base, tmp_path_factory) -> Path:
    return build_adapter(base, tmp_path_factory.mktemp("inference") / "nf4_adapter", quantized=True)


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
