"""Composition: every file of every group, typed; what cannot run is refused with what to type instead."""

import functools
import itertools
import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cqlora.config import CONFIG_DIR, RunConfig, register_schemas
from cqlora.diagnosis import to_schema
from cqlora.errors import ConfigError
from cqlora.frozen import freeze_config, load_frozen

GROUPS = ("model", "data", "stage", "hardware", "tracking")


@pytest.fixture(autouse=True, scope="module")
def _hydra():
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        yield


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIG_DIR / group).glob("*.yaml"))


def typed(*overrides: str) -> RunConfig:
    return to_schema(compose("config", list(overrides)), RunConfig)


@pytest.mark.parametrize("stage", choices("stage"))
@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_of_every_group_composes_and_types(group, stage):
    for choice in choices(group):
        config = typed(f"stage={choice if group == 'stage' else stage}", f"{group}={choice}")
        assert group == "tracking" or getattr(config, group).name == choice
        assert config.gradient_accumulation_steps >= 1


def test_every_combination_of_model_data_stage_hardware_and_tracking_types():
    def convert(node):
        return OmegaConf.to_object(node)

    alone = {
        group: [convert(compose("config", ["stage=pretrain", f"{group}={choice}"])[group]) for choice in choices(group)]
        for group in ("data", "tracking")
    }
    counted = 0
    # A stage's values come from the model and the hardware beside it; data and tracking stand alone.
    for model, stage, hardware in itertools.product(*(choices(g) for g in ("model", "stage", "hardware"))):
        composed = _swap(model=model, stage=stage, hardware=hardware)
        parts = {group: convert(composed[group]) for group in ("model", "stage", "hardware", "lora")}
        for data, tracking in itertools.product(alone["data"], alone["tracking"]):
            config = RunConfig(**parts, data=data, tracking=tracking)
            assert config.gradient_accumulation_steps >= 1
            counted += 1
    assert counted == math.prod(len(choices(group)) for group in GROUPS)


@functools.cache
def _node(group: str, choice: str):
    return compose("config", ["stage=pretrain", f"{group}={choice}"])[group]


def _swap(**groups: str):
    """A composition with the nodes of some groups put in, as composing with those choices gives."""
    composed = compose("config", ["stage=pretrain"])
    for group, choice in groups.items():
        composed._set_item_impl(group, _node(group, choice))
    return composed


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_types_on_every_hardware(experiment):
    for hardware in choices("hardware"):
        config = typed(f"experiment={experiment}", f"hardware={hardware}")
        assert config.model.name == "llama_65b"
        assert config.stage.sequence_length == 2048
        assert config.stage.global_batch_size == 32


def test_the_published_instruct_model_goes_on_from_the_base_models_adapter():
    instruct = typed("experiment=chinese_llama_65b_instruct")
    base = typed("experiment=chinese_llama_65b_base")
    assert instruct.stage.init_adapter == "outputs/chinese_llama_65b_base/adapter" and not base.stage.init_adapter
    # What an adapter fixes.
    assert (instruct.lora, instruct.model) == (base.lora, base.model)
    assert instruct.stage.embeddings is base.stage.embeddings


def test_a_choice_on_the_command_line_wins_over_the_experiment():
    config = typed("experiment=chinese_llama_65b_base", "model=llama_7b", "stage=sft")
    assert (config.model.name, config.stage.name, config.lora.rank) == ("llama_7b", "sft", 64)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["+stage.x=1"], ["stage.x is not a key"]),
        (["+stage.lerning_rate=1"], ["stage.lerning_rate", "did you mean stage.learning_rate?"]),
        (["stage.global_batch_size=3"], ["stage.global_batch_size=3", "use stage.global_batch_size=4"]),
        (["stage.sequence_length=600"], ["600", "512 positions", "allow_beyond_positions"]),
        (["hardware.precision=float16"], ["hardware.gradient_scaler=true"]),
        (["hardware.processes_per_node=2", "stage.global_batch_size=4"], ["strategy=ddp"]),
        (["stage.learning_rate=0"], ["stage.learning_rate=0.0", "above 0"]),
        (["stage.max_steps=null", "stage.epochs=null"], ["stage.max_steps", "stage.epochs"]),
        (["model.num_attention_heads=5"], ["hidden_size=64", "num_attention_heads=5"]),
        (["data=oasst1", "data.sources.oasst1.stages=[sft]"], ["no source for stage=pretrain"]),
        (["lora.target_modules=[]"], ["[all]"]),
        (["lora.dropout=1.5"], ["lora.dropout=1.5"]),
        (["hardware=4xa100_40g", "model.quantization=int8", "model=tiny"], ["int8", "ddp"]),
        (["lora.method=pissa", "stage.embeddings=lora"], ["pissa", "new_rows"]),
        (["hardware.cpu_offload=true"], ["fsdp"]),
    ],
)
def test_what_contradicts_is_refused_in_one_sentence_that_says_what_to_type(overrides, words):
    with pytest.raises(ConfigError) as caught:
        typed("stage=pretrain", *overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_frozen_configuration_reads_back_equal(stage, tmp_path: Path):
    config = typed(f"stage={stage}", "model=llama3_8b", "data=wiki_zh_en", "hardware=cpu", "lora.method=dora")
    assert load_frozen(freeze_config(config, tmp_path)) == config
