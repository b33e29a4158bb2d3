"""Counts against published ones, and against a model that is built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from cqlora.config.base_shape import read_shape
from cqlora.config.choices import AdapterMethod
from cqlora.config.schema import LoraConfig, ModelConfig
from cqlora.errors import ConfigError
from cqlora.model.tiny import llama_config
from cqlora.plan.shapes import adapter_parameters, base_parameters, embedding_parameters
from tests.kinds import SHAPE, VARIANTS
from tests.plan.runs import compose_run, small_model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("llama_7b", 159_907_840),
        ("llama_13b", 250_347_520),
        ("llama_33b", 487_587_840),
        ("llama_65b", 799_539_200),
    ],
)
def test_rank_64_on_all_linear_layers_has_the_published_number_of_parameters(model: str, expected: int) -> None:
    config = compose_run("stage=pretrain", f"model={model}", "lora.rank=64")
    assert adapter_parameters(config.model, config.lora) == expected


@pytest.mark.parametrize(("model", "expected"), [("llama_7b", 6_738_415_616), ("llama2_70b", 68_976_648_192)])
def test_base_has_the_published_number_of_parameters(model: str, expected: int) -> None:
    assert base_parameters(compose_run("stage=pretrain", f"model={model}").model) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_a_model_that_is_built(tied: bool) -> None:
    shape = small_model(tie_word_embeddings=tied)
    built = LlamaForCausalLM(llama_config(shape))
    assert base_parameters(shape) == sum(p.numel() for p in built.parameters())
    matrices = {built.model.embed_tokens.weight, built.lm_head.weight}
    assert embedding_parameters(shape) == sum(p.numel() for p in matrices)


def shape_of(config: dict[str, Any], folder: Path) -> ModelConfig:
    """What model=auto takes of a folder with this config.json."""
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig(name="auto", path=str(folder), **read_shape(folder))


def count_stock(config: dict[str, Any]) -> int:
    """Parameters of transformers' model, which is laid out without memory; shared ones count once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind, options", VARIANTS, ids=str)
def test_every_kind_has_as_many_parameters_as_its_stock_model(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    config = {**SHAPE, "model_type": kind, **options}
    assert base_parameters(shape_of(config, tmp_path)) == count_stock(config)


PUBLISHED = {
    "Llama 3.1 8B": (8_030_261_248, {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    }),
    "Mistral 7B v0.3": (7_248_023_552, {
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "tie_word_embeddings": False, "sliding_window": None,
    }),
    "Qwen2.5 7B": (7_615_616_512, {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, "use_sliding_window": False,
        "sliding_window": 131072,
    }),
    "Qwen3 8B": (8_190_735_360, {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "tie_word_embeddings": False, "attention_bias": False,
    }),
    "SmolLM3 3B": (3_075_098_624, {
        # Published without tie_word_embeddings, which is true in this kind.
        "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
        "max_position_embeddings": 65536, "no_rope_layer_interval": 4, "attention_bias": False, "mlp_bias": False,
    }),
}  # fmt: skip
"""What is published of a model: its parameters, and of its config.json what decides on them."""


@pytest.mark.parametrize("parameters, config", PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_are_counted_whole(parameters: int, config: dict[str, Any], tmp_path: Path) -> None:
    assert base_parameters(shape_of(config, tmp_path)) == count_stock(config) == parameters


def test_a_bias_of_a_layer_that_no_block_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.biases names qkv, which no block has; use some of \[q_proj,"):
        small_model(biases=["qkv"])


def test_dora_adds_one_magnitude_per_output() -> None:
    model = small_model()
    plain = adapter_parameters(model, LoraConfig(target_modules=["down_proj"]))
    dora = adapter_parameters(model, LoraConfig(target_modules=["down_proj"], method=AdapterMethod.dora))
    assert dora - plain == model.num_hidden_layers * model.hidden_size


def test_unknown_target_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"names qkv, which no block has; use \[all\] or some of \[q_proj,"):
        adapter_parameters(small_model(), LoraConfig(target_modules=["qkv"]))
