"""Absurd values for every key of every verb: a valid configuration or one sentence, never another exception."""

import contextlib
import copy
import dataclasses
import itertools
import random
import typing
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cqlora.config.diagnosis import explain_composition, to_schema
from cqlora.config.reference import SCHEMAS, load_schema
from cqlora.config.run_yaml import load_run_yaml, write_run_yaml
from cqlora.config.schema import CONFIG_DIR, RunConfig, register_schemas
from cqlora.errors import ConfigError

NUMBERS = [
    0,
    -1,
    1,
    2,
    2**31,
    2**40,
    2**63,
    10**30,
    -(10**400),
    float("nan"),
    float("inf"),
    -float("inf"),
    1e308,
    1e-320,
]
TEXTS = [
    "", " ", "\0", "x" * 300, "../" * 2000, "😀" * 80, "\ud800", "a\nb", "~", "~nobody/x", "C:\\x", "null", "NaN", "-1",
    "--x", "é" * 200, "None", "/", "a/b=c", "[1", "{",
]  # fmt: skip
OTHERS = [None, [], [""], ["a", None], {}, {"a": 1}, True]
WHOLE = {
    "run": ["stage=pretrain"],
    "plan": ["stage=sft"],
    "fetch": [],
    "convert": ["input_dir=a", "output_dir=b"],
    "extend": ["base=.", "output_dir=b", "vocab=cjk"],
    "merge": ["base=a", "output_dir=b", "adapter=[c]"],
    "chat": ["base=a"],
    "serve": ["base=a"],
    "generate": ["base=a", "output=b.jsonl"],
    "report": ["folder=a"],
    "push": ["folder=a", "repo=b/c"],
    "evaluate": ["base=a"],
}


def composed_for(verb: str):
    register_schemas()
    schema = load_schema(verb)
    ConfigStore.instance().store(name=f"{verb}_schema", node=schema)
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        return schema, compose({"run": "config"}.get(verb, verb), WHOLE[verb])


def leaves(schema: type, path: str = ""):
    """Each key, and whether it takes numbers."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{path}{field.name}.")
        elif typing.get_origin(hint) is dict:
            yield from leaves(typing.get_args(hint)[1], f"{path}{field.name}.sample_zh.")
        else:
            yield path + field.name, bool({int, float} & {hint, *typing.get_args(hint)})


def outcome(schema: type, composed, changes: dict[str, object]) -> str:
    """`right`, or the sentence that a changed composition is refused with; any other exception comes through."""
    changed = copy.deepcopy(composed)
    try:
        for key, value in changes.items():
            OmegaConf.update(changed, key, value, merge=False)
        config = to_schema(changed, schema)
    except ConfigError as error:
        return str(error)
    except (OmegaConfBaseException, OverflowError) as error:
        return explain_composition(error, schema, [])
    assert isinstance(config, schema)
    if isinstance(config, RunConfig):
        config.notes()
    return "right"


@pytest.mark.parametrize("verb", sorted(set(SCHEMAS) - {"prepare"}))
def test_any_value_of_any_key_is_taken_or_refused_in_one_sentence(verb):
    schema, composed = composed_for(verb)
    assert outcome(schema, composed, {}) == "right"
    tried, refused, generator = 0, 0, random.Random(7)
    for key, is_number in leaves(schema):
        if verb == "plan" and "." in key:
            # Those are of `run`.
            continue
        for value in generator.sample([*(NUMBERS if is_number else TEXTS), *OTHERS], 7):
            message = outcome(schema, composed, {key: value})
            assert "\n" not in message.replace("a\nb", "") and len(message) < 1200 + len(str(value)), (
                key,
                value,
                message,
            )
            tried, refused = tried + 1, refused + (message != "right")
    assert tried >= 7 and 0 < refused < tried


def test_a_hundred_and_fifty_pairs_of_absurd_values_are_taken_or_refused_in_one_sentence():
    schema, composed = composed_for("run")
    keys, generator = dict(leaves(RunConfig)), random.Random(5)
    for _ in range(150):
        changes = {
            key: generator.choice([*(NUMBERS if keys[key] else TEXTS), *OTHERS])
            for key in generator.sample(sorted(keys), 2)
        }
        message = outcome(schema, composed, changes)
        assert "\n" not in message.replace("a\nb", ""), (changes, message)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**40}, "from 0 to 2147483647"),
        ({"stage.learning_rate": float("inf")}, "no finite number"),
        ({"stage.learning_rate": float("nan")}, "no finite number"),
        ({"stage.sequence_length": 1}, "of at least 2"),
        ({"hardware.micro_batch_size": 3}, "not divisible"),
        ({"stage.keep_last": 0}, "above 0"),
        ({"model.path": ""}, "model.path is empty"),
        ({"model.path": "x" * 300}, "255 bytes"),
        ({"data.cache_dir": "a\0b"}, "zero byte"),
        ({"stage.max_steps": 10, "stage.epochs": 3.0}, "stage.epochs=3.0 has no effect"),
        ({"lora.pissa_iterations": 4}, "lora.method=pissa"),
        ({"model.double_quantization": False, "model.quantization": "none"}, "model.quantization=nf4"),
        ({"stage.embeddings": "frozen", "stage.embeddings_learning_rate": 1e-3}, "stage.embeddings=new_rows"),
        ({"stage.schedule": "constant", "stage.min_learning_rate_ratio": 0.0}, "stage.schedule=cosine"),
        ({"data.clean.near_threshold": 0.5}, "data.clean.deduplicate=near"),
        ({"hardware.gpus_per_node": 2}, "hardware.strategy=layers"),
        ({"hardware.cpu_offload": True}, "fsdp"),
        ({"tracking.tracker": "none", "tracking.mode": "online"}, "tracking=wandb"),
        ({"tracking.tracker": "tensorboard", "tracking.tags": ["a"]}, "tracking=wandb"),
        ({"data.sources.sample_zh.separator": "--"}, "kind=text"),
        ({"data.sources.sample_zh.langs": ["zh"]}, "kind=oasst1"),
        ({"data.sources.sample_zh.oasst_paths": "all"}, "kind=oasst1"),
        ({"data.sources.sample_zh.subset": "x"}, "a dataset"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused_with_what_to_type(changes, words):
    message = outcome(*composed_for("run"), changes)
    assert words in message


@pytest.mark.parametrize(
    "verb, changes, words",
    [
        ("merge", {"gguf_type": "q8_0"}, "format=gguf"),
        ("merge", {"format": "gguf", "max_shard_size": "1GB"}, "format=safetensors"),
        ("merge", {"measure_tokens": 5}, "measure=FILE"),
        ("merge", {"precision": "float32"}, "onto=nf4"),
        ("extend", {"vocab.size": 9}, "vocab=auto"),
        ("extend", {"vocab.seed": 9}, "vocab.init=sampled"),
        ("extend", {"max_shard_size": "1GB"}, "a GGUF file as base"),
        ("chat", {"temperature": 0.0, "top_p": 0.5}, "a temperature above 0"),
        ("serve", {"timeout": float("nan")}, "no finite number"),
        ("plan", {"added_rows": -1}, "added_rows=-1"),
    ],
)
def test_options_of_the_other_verbs_that_have_no_effect_are_refused(verb, changes, words):
    assert words in outcome(*composed_for(verb), changes)


def test_a_warm_up_as_long_as_the_run_is_said():
    schema, composed = composed_for("run")
    composed.stage.max_steps = 4
    assert "stage.warmup_steps=5" in to_schema(composed, schema).notes()[0]
    composed.stage.max_steps = 400
    assert not to_schema(composed, schema).notes()


def test_a_tilde_is_the_home_folder_in_every_path_of_every_verb(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    paths = {
        "run": ["model.path", "data.root", "data.cache_dir", "data.sources.sample_zh.path", "stage.init_adapter",
                "stage.resume"],
        "merge": ["base", "output_dir"], "convert": ["input_dir", "output_dir"], "fetch": ["output_dir"],
        "chat": ["base", "adapter"], "serve": ["base", "adapter"], "extend": ["output_dir"],
        "report": ["output"],
    }  # fmt: skip
    for verb, keys in paths.items():
        schema, composed = composed_for(verb)
        for key in keys:
            OmegaConf.update(composed, key, "~/a.html")
        config = to_schema(composed, schema)
        settings = OmegaConf.create(dataclasses.asdict(config))
        assert {OmegaConf.select(settings, key) for key in keys} == {"/home/somebody/a.html"}


def nest_aliases() -> str:
    """A few lines of YAML that fill the memory of whoever follows them."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    names = "abcdefghij"
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in itertools.pairwise(names)]
    return "\n".join(lines) + "\n"


DAMAGES = {
    "empty": lambda text: "",
    "cut in half": lambda text: text[: len(text) // 2],
    "cut in a word": lambda text: text[: text.index("intermediate") + 5],
    "no YAML": lambda text: text.replace("model:", "model: [", 1),
    "tabs": lambda text: text.replace("  name", "\tname", 1),
    "a list": lambda text: "- a\n- b\n",
    "a word": lambda text: "run\n",
    "unknown key": lambda text: text + "surprise: 1\n",
    "unknown key within": lambda text: text.replace("  hidden_size:", "  hidden: 3\n  hidden_size:", 1),
    "another stage": lambda text: text.replace("name: pretrain", "name: rlhf", 1),
    "stage a list": lambda text: text.replace("name: pretrain", "name: [a]", 1),
    "wrong type": lambda text: text.replace("seed: 1", "seed: many", 1),
    "wrong choice": lambda text: text.replace("quantization: nf4", "quantization: nf5", 1),
    "not finite": lambda text: text.replace("learning_rate: 0.0002", "learning_rate: .nan", 1),
    "a group that is null": lambda text: text.replace("lora:\n", "lora: null\nold:\n", 1),
    "a missing group": lambda text: text[text.index("data:") :],
    "interpolation of nothing": lambda text: text.replace("seed: 1", "seed: ${nothing}", 1),
    "half an interpolation": lambda text: text.replace("seed: 1", "seed: ${", 1),
    "aliases that stand for nine to the ninth words": lambda text: text + nest_aliases(),
    "zeros": lambda text: "\0" * 100,
}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> str:
    config = to_schema(composed_for("run")[1], RunConfig)
    return write_run_yaml(config, tmp_path_factory.mktemp("run")).read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_yaml_is_refused_in_one_sentence_that_names_it(damage, frozen, tmp_path: Path):
    file = tmp_path / "run.yaml"
    damaged = DAMAGES[damage](frozen)
    assert damaged != frozen
    file.write_text(damaged, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_run_yaml(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_yaml_with_any_bytes_changed_is_read_or_refused(frozen, tmp_path: Path):
    generator, file = random.Random(3), tmp_path / "run.yaml"
    for _ in range(60):
        content = bytearray(frozen.encode())
        for _ in range(3):
            content[generator.randrange(len(content))] = generator.randrange(256)
        file.write_bytes(content)
        with contextlib.suppress(ConfigError):
            load_run_yaml(file)
