"""Counts against published ones, and against a model that is built."""

import pytest
from transformers import LlamaForCausalLM

from cqlora.config.choices import AdapterMethod
from cqlora.config.schema import LoraConfig
from cqlora.errors import ConfigError
from cqlora.model.tiny import llama_config
from cqlora.plan.shapes import adapter_parameters, base_parameters, embedding_parameters
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


def test_dora_adds_one_magnitude_per_output() -> None:
    model = small_model()
    plain = adapter_parameters(model, LoraConfig(target_modules=["down_proj"]))
    dora = adapter_parameters(model, LoraConfig(target_modules=["down_proj"], method=AdapterMethod.dora))
    assert dora - plain == model.num_hidden_layers * model.hidden_size


def test_unknown_target_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"names qkv, which no block has; use \[all\] or some of \[q_proj,"):
        adapter_parameters(small_model(), LoraConfig(target_modules=["qkv"]))
