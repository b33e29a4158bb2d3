"""Composition: every file of every group, typed; what cannot run is refused with what to type instead."""

import dataclasses
import functools
import itertools
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from cqlora.config.diagnosis import to_schema
from cqlora.config.run_yaml import load_run_yaml, write_run_yaml
from cqlora.config.schema import CONFIG_DIR, HardwareConfig, ModelConfig, RunConfig, register_schemas
from cqlora.config.sweeps import PROBED, REPLIED
from cqlora.errors import ConfigError

GROUPS = ("model", "data", "stage", "hardware", "tracking")


@pytest.fixture(autouse=True, scope="module")
def _hydra():
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        yield


def choices(group: str) -> list[str]:
    """All but model=auto, which needs a folder (test_base_shape)."""
    return sorted(file.stem for file in (CONFIG_DIR / group).glob("*.yaml") if file.stem != "auto" or group != "model")


def typed(*overrides: str) -> RunConfig:
    return to_schema(compose("config", list(overrides)), RunConfig)


def cover_pairs(groups: dict[str, list[str]]) -> list[dict[str, str]]:
    """Rows of one choice a group in which every two choices of two groups meet; greedy, in a fixed order."""
    unmet = {
        frozenset([(one, first), (other, second)])
        for one, other in itertools.combinations(groups, 2)
        for first, second in itertools.product(groups[one], groups[other])
    }
    rows = []
    while unmet:
        row = dict(sorted(min(unmet, key=sorted)))
        for group in [group for group in groups if group not in row]:
            met = {choice: sum({(group, choice), pair} in unmet for pair in row.items()) for choice in groups[group]}
            row[group] = max(met, key=lambda choice: met[choice])
        unmet -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append(row)
    return rows


@functools.cache
def compose_alone(group: str, choice: str) -> DictConfig:
    return compose("config", ["stage=pretrain", f"{group}={choice}"])[group]


def put_together(row: dict[str, str], rest: str = "stage=pretrain") -> DictConfig:
    """What composing with these choices gives, from nodes that are composed once each."""
    composed = compose_rest(rest).copy()
    for group, choice in row.items():
        composed._set_item_impl(group, compose_alone(group, choice))
    return composed


@functools.cache
def compose_rest(override: str) -> DictConfig:
    return compose("config", [override])


def test_every_two_choices_of_two_groups_compose_and_type_together():
    """Every choice is composed by Hydra once. A rule is between two groups; all five groups' products are tens of
    thousands and prove no more."""
    groups = {group: choices(group) for group in GROUPS}
    rows = cover_pairs(groups)
    for row in rows:
        config = to_schema(put_together(row), RunConfig)
        assert {group: getattr(config, group).name for group in GROUPS if group != "tracking"} == {
            group: choice for group, choice in row.items() if group != "tracking"
        }
        assert config.gradient_accumulation_steps >= 1
    for one, other in itertools.combinations(GROUPS, 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(groups[one], groups[other]))


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_types_on_the_hardware_it_is_for(experiment):
    small = "smollm2" in experiment
    for hardware in ["auto", "cpu", "1x4090"] if small else choices("hardware"):
        config = to_schema(put_together({"hardware": hardware}, f"experiment={experiment}"), RunConfig)
        assert config.model.name == ("smollm2_135m" if small else "llama_65b")
        assert config.stage.sequence_length == (512 if small else 2048)
        assert config.stage.global_batch_size == (2 if small else 32)


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
    assert load_run_yaml(write_run_yaml(config, tmp_path)) == config


def test_no_file_of_a_group_restates_a_default_of_the_schema():
    """A line that says what holds without it hides those that matter."""
    schemas = {"model": ModelConfig, "hardware": HardwareConfig}
    for group, schema in schemas.items():
        defaults = {field.name: field.default for field in dataclasses.fields(schema)}
        for file in (CONFIG_DIR / group).rglob("*.yaml"):
            written = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            restated = [
                key for key, value in written.items() if value == getattr(defaults.get(key), "name", defaults.get(key))
            ]
            assert not restated, file.name


def test_an_objective_of_the_probe_needs_the_probe():
    from cqlora.evaluation.probe import list_patterns
    from cqlora.train.forgetting import WATCHED

    languages = sorted({pattern.language for pattern in list_patterns() if pattern.name == WATCHED})
    assert {metric.rpartition("/")[0] for metric in PROBED} == {f"eval/probe/{WATCHED}/{each}" for each in languages}
    words = ["stage=sft", f"sweep.objectives=[{','.join(PROBED)}]"]
    assert list(typed(*words, "stage.eval_probe=true").sweep.goals) == list(PROBED)
    with pytest.raises(ConfigError, match=r"is measured with stage\.eval_probe=true; add it"):
        typed(*words)


def test_an_objective_of_replies_needs_replies():
    words = ["stage=sft", f"sweep.objectives=[{','.join(REPLIED)}]"]
    assert list(typed(*words, "stage.eval_generations=1").sweep.goals) == list(REPLIED)
    with pytest.raises(ConfigError, match=r"is measured with stage\.eval_generations=2; add it"):
        typed(*words)
