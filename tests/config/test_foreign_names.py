"""What users of other programs type: each name is answered with ours, and each of ours is one."""

import re
import sys

import pytest
from hydra import compose, initialize_config_dir

from cqlora import extend
from cqlora.chat import ChatConfig
from cqlora.cli import quote_words
from cqlora.config.composition import compose_checked
from cqlora.config.diagnosis import _typed_keys, to_schema
from cqlora.config.foreign_names import FOREIGN_CHOICES, FOREIGN_KEYS
from cqlora.config.schema import CONFIG_DIR, RunConfig, register_schemas
from cqlora.errors import ConfigError


def refusal(*arguments: str) -> str:
    """The sentence with which a run is refused."""
    register_schemas()
    with (
        pytest.raises(ConfigError) as caught,
        compose_checked(RunConfig),
        initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"),
    ):
        to_schema(compose("config", [quote_words(argument) for argument in ("stage=sft", *arguments)]), RunConfig)
    return str(caught.value)


@pytest.mark.parametrize(
    "argument, words",
    [
        ("hardware=4090", "did you mean hardware=1x4090 or hardware=2x4090?"),
        ("hardware=rtx4090", "did you mean hardware=1x4090 or hardware=2x4090?"),
        ("hardware=RTX-3090", "hardware=1x3090"),
        ("hardware=gpu", "did you mean hardware=auto?"),
        ("data=null", "data has no value, and no run goes without; use data=alpaca or auto"),
        ("model=null", "use model=auto or llama2_13b or"),
        ("path=~/x.json", "model.path for a model's folder, data.sources.NAME.path for text"),
        ("path=models/a=b", "model.path for a model's folder"),
        ("lr=1e-4", "did you mean stage.learning_rate=1e-4?"),
        ("lora_rank=8", "did you mean lora.rank=8?"),
        ("lora.r=8", "did you mean lora.rank=8?"),
        ("lora_alpha=16", "did you mean lora.alpha=16?"),
        (
            "stage.system_prompt=You are a helper, be brief",
            "type \"stage.system_prompt='You are a helper, be brief'\" for one text, or add --multirun for each",
        ),
        ("stage.system_prompt=你好, 请", "type \"stage.system_prompt='你好, 请'\" for one text"),
        ("tracking.group=a, $b", "type 'tracking.group='\"'\"'a, $b'\"'\"'' for one text"),
        ("seed=1,2", "add --multirun to run with each, or use seed=[1,2] for a list"),
        ("model=hf/llama", "model.path=hf/llama"),
        ("model=meta-llama/Llama-2-7b-hf", "model.path=meta-llama/Llama-2-7b-hf"),
        ("model=Llama-3-8B", "did you mean model=llama3_8b?"),
        ("data=self_instruct", "did you mean data=belle data.sources.belle.path=FILE?"),
        ("data=mine/a.jsonl", "data=auto data.sources.auto.path=mine/a.jsonl"),
        ("stage=pt", "did you mean stage=pretrain?"),
        ("batch_size=4", "stage.global_batch_size=N"),
        ("gradient_accumulation_steps=4", "stage.global_batch_size=N"),
        ("learning_rate=1", "did you mean stage.learning_rate=1?"),
        ("max_length=512", "did you mean stage.sequence_length=512?"),
        ("cutoff_len=512", "did you mean stage.sequence_length=512?"),
        ("num_train_epochs=3", "did you mean stage.epochs=3?"),
        ("model_name_or_path=a/b", "did you mean model.path=a/b?"),
        ("dataset=x", "data.sources.auto.path=FILE"),
        ("output_dir=x", "did you mean hydra.run.dir=x?"),
        ("quantization_bit=4", "model.quantization=nf4"),
        ("bf16=true", "did you mean hardware.precision=bfloat16?"),
        ("gpus=4", "hardware.processes_per_node"),
        ("gpu=h100", "did you mean hardware=NAME of your machine?"),
        ("experiment=seed_recipe_65b_base", "did you mean experiment=recipe_2023_65b_base?"),
        ("stage.learning_rate=1,2", "add --multirun"),
        ("seed=null", "seed=null is no value"),
        ("data.sources.foo.path=x", "data.sources has sample_zh"),
        ("+hardware=cpu", "chosen twice"),
    ],
)
def test_what_another_program_calls_it_is_answered_with_what_to_type(argument, words):
    message = refusal(argument)
    assert words in message and "\n" not in message


def test_a_foreign_key_is_none_of_ours_and_is_answered_with_one_that_is():
    run = set(dict(_typed_keys(RunConfig)))
    known = (
        run
        | set(dict(_typed_keys(ChatConfig)))
        | {"max_tokens", "adapter", "hydra.run.dir", "data", "stage", "tracking"}
    )
    for foreign, ours in FOREIGN_KEYS.items():
        target = re.match(r"[\w.]+", ours)
        assert target and (target[0] in known or target[0].startswith("data.sources.")), f"{foreign} → {ours}"
        assert foreign not in run or "." not in target[0], f"{foreign} is a key of ours"


def test_a_foreign_choice_is_answered_with_one_that_there_is():
    for group, choices in FOREIGN_CHOICES.items():
        names = {file.stem for file in (CONFIG_DIR / group).glob("*.yaml")}
        assert set(choices.values()) <= names and not set(choices) & names


def test_a_vocabulary_that_is_no_choice_is_answered_with_where_a_file_is_typed(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["cqlora extend", "base=a", "output_dir=b", "vocab=foo"])
    with pytest.raises(SystemExit):
        extend.main()
    told = capfd.readouterr().err
    assert "vocab=foo does not exist" in told and "vocab=path vocab.model=foo. Choices: auto" in told
