"""`model=auto`: the shape is the folder's own, and what is no model's folder is refused in a sentence."""

import dataclasses
import json
import os
import re
import shutil

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from cqlora.base import read_base
from cqlora.config import base_shape
from cqlora.config.diagnosis import to_schema
from cqlora.config.run_yaml import load_run_yaml, write_run_yaml
from cqlora.config.schema import CONFIG_DIR, ModelConfig, RunConfig, register_schemas
from cqlora.errors import ConfigError, ModelError
from tests.conftest import run_verb

SMALL = {"vocab_size": 700, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
         "num_attention_heads": 6, "num_key_value_heads": 2}  # fmt: skip


def typed(*overrides: str) -> RunConfig:
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        return to_schema(compose("config", ["stage=pretrain", "data=sample", *overrides]), RunConfig)


def shape(model: ModelConfig) -> dict[str, object]:
    about = set(SMALL) | {"max_position_embeddings", "tie_word_embeddings"}
    return {key: value for key, value in dataclasses.asdict(model).items() if key in about}


@pytest.mark.parametrize(
    "kind, biases, head_norms",
    [(LlamaConfig, [], False), (Qwen2Config, ["q_proj", "k_proj", "v_proj"], False), (Qwen3Config, [], True)],
)  # fmt: skip
def test_biases_and_norms_of_heads_are_those_of_the_kind(kind, biases, head_norms, tmp_path):
    kind(**SMALL).save_pretrained(tmp_path)
    model = typed("model=auto", f"model.path={tmp_path}").model
    assert (model.biases, model.head_norms) == (biases, head_norms)


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config])
def test_the_shape_is_that_which_transformers_reads_of_the_folder(kind, tmp_path):
    stock = kind(**SMALL, max_position_embeddings=333, tie_word_embeddings=True, pad_token_id=None)
    stock.save_pretrained(tmp_path)
    model = typed("model=auto", f"model.path={tmp_path}", "stage.sequence_length=300").model
    assert shape(model) == {key: getattr(stock, key) for key in shape(model)}
    # A llama's is not written, and 8 for these; Qwen 3's is 128 unless it is.
    assert model.head_size == (getattr(stock, "head_dim", None) or 8)


def test_a_folder_is_read_once_for_all_keys_and_again_once_it_changed(tmp_path, monkeypatch):
    read, read_object = [], base_shape.read_object
    monkeypatch.setattr(base_shape, "read_object", lambda file: read.append(file) or read_object(file))
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    for layers in (3, 5):
        LlamaConfig(**SMALL | {"num_hidden_layers": layers}).save_pretrained(tmp_path)
        read.clear()
        assert typed("model=auto", f"model.path={tmp_path}").model.num_hidden_layers == layers
        assert read == [tmp_path / "config.json"]


@pytest.mark.parametrize(
    "make, told",
    [(lambda file: file.mkdir(), "is a folder and no file"), (os.mkfifo, "is no plain file"),
     (lambda file: file.symlink_to("gone.json"), "is a link to gone.json, which does not exist"),
     (lambda file: file.symlink_to("config.json"), "is a link to config.json, which leads back to it")],
    ids=["folder", "pipe", "broken link", "loop"],
)  # fmt: skip
def test_what_stands_in_the_place_of_config_json_is_told(make, told, tmp_path):
    file = tmp_path / "config.json"
    make(file)
    for read, error in ((base_shape.read_shape, ConfigError), (read_base, ModelError)):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(error, match=f"{re.escape(str(file))} {told}; give the folder"):
            read(tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [("sliding_window", "x"), ("sliding_window", 0), ("sliding_window", 1.5), ("use_sliding_window", "no"),
     ("max_position_embeddings", None)],
)  # fmt: skip
def test_a_number_that_transformers_would_not_take_is_told_with_file_key_and_value(key, value, tmp_path):
    MistralConfig(**SMALL).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=f"{re.escape(str(file))} has {key}={shorten_json(value)} where "):
        typed("model=auto", f"model.path={tmp_path}")


@pytest.mark.parametrize(
    "scaling, told",
    [({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "scales positions by .*mrope.* which is none of"),
     ({"rope_parameters": None, "rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
      "which is none"),
     ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, "for the whole model"),
     ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
      "by rope_scaling and by rope_parameters")],
    ids=["unknown", "two kinds", "by layer", "two places"],
)  # fmt: skip
def test_positions_that_two_programs_would_scale_otherwise_are_refused(scaling, told, tmp_path):
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scaling))
    with pytest.raises(ConfigError, match=told):
        typed("model=auto", f"model.path={tmp_path}")


def shorten_json(value):
    return "null" if value is None else re.escape(repr(value))


def test_a_frozen_configuration_holds_the_numbers_and_no_longer_reads_the_folder(tmp_path):
    folder = tmp_path / "base"
    LlamaConfig(**SMALL).save_pretrained(folder)
    config = typed("model=auto", f"model.path={folder}")
    file = write_run_yaml(config, tmp_path)
    (folder / "config.json").unlink()
    assert load_run_yaml(file) == config and "of_base" not in file.read_text()


def test_rows_that_an_extension_added_are_not_of_the_shape(tmp_path):
    LlamaConfig(**{**SMALL, "vocab_size": 764}).save_pretrained(tmp_path)
    (tmp_path / "cqlora.json").write_text(json.dumps({"first_added_row": 700, "added_rows": 60}))
    assert typed("model=auto", f"model.path={tmp_path}").model.vocab_size == 700


def test_a_key_that_is_typed_stands_above_the_folder(tmp_path):
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    model = typed("model=auto", f"model.path={tmp_path}", "model.num_hidden_layers=2").model
    assert (model.num_hidden_layers, model.hidden_size) == (2, 48)


def test_a_run_with_the_folders_shape_trains_what_one_with_its_named_group_trains(workspace, tmp_path):
    run_verb(workspace, "run", "stage=pretrain", "model=tiny", "data=sample", "--cfg", "job")
    folders = {}
    for group in ("tiny", "auto"):
        folders[group] = tmp_path / group
        run_verb(
            workspace, "run", "stage=pretrain", f"model={group}", "model.path=models/tiny", "data=sample",
            "hardware=cpu", "tracking=none", "stage.max_steps=2", "stage.sequence_length=128", "stage.eval_tokens=300",
            f"hydra.run.dir={folders[group]}",
        )  # fmt: skip
    weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in folders.values()]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "content, told",
    [
        (None, "has no config.json; give the folder"),
        ("{", "cannot be read as JSON"),
        (json.dumps({"model_type": "llama", "hidden_size": 48}), "vocab_size"),
        (json.dumps({"model_type": "gemma3", "text_config": {}}), "which is multi-modal"),
        (json.dumps({**SMALL, "model_type": "qwen2_moe"}), "holds a qwen2_moe model"),
        (json.dumps({**SMALL, "model_type": "qwen2"}), "has no max_position_embeddings; add it"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "plan", "prepare"])
def test_a_folder_without_a_model_is_refused_in_a_sentence(verb, content, told, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    done = run_verb(
        tmp_path, verb, "stage=pretrain", "data=sample", "model=auto", f"model.path={folder}", "hardware=cpu", expect=2
    )
    assert told in done.stderr and str(folder) in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_sweep_may_be_over_folders_and_over_named_groups_beside_one(workspace, tmp_path):
    base = workspace / "models" / "tiny"
    run_verb(workspace, "prepare", "stage=pretrain", "model=tiny", "data=sample")
    overrides = ("stage=pretrain", "data=sample", "hardware=cpu", "tracking=none", "stage.max_steps=1",
                 "stage.sequence_length=128", "stage.eval_tokens=300", "--multirun")  # fmt: skip
    shutil.copytree(base, tmp_path / "twin")
    for number, swept in enumerate((["model=auto", f"model.path={base},{tmp_path}/twin"],
                                    ["model=auto,tiny", f"model.path={base}"])):  # fmt: skip
        folder = tmp_path / f"sweep{number}"
        run_verb(workspace, "run", *swept, *overrides, f"hydra.sweep.dir={folder}")
        trained = [(folder / job / "adapter" / "adapter_model.safetensors").read_bytes() for job in ("0", "1")]
        assert trained[0] == trained[1]


def test_a_run_that_does_not_fit_is_told_of_smaller_ones_and_auto_is_none_of_them(tmp_path):
    done = run_verb(
        tmp_path, "plan", "stage=sft", "data=sample", "model=llama3_70b", "hardware=1x4090", "plan=suggest", expect=3
    )
    assert "model=llama3_8b" in done.stdout and "auto" not in done.stdout.replace("=auto", "")


@pytest.mark.parametrize("verb", ["run", "plan", "prepare"])
def test_a_path_that_was_left_out_is_asked_for(verb, tmp_path):
    done = run_verb(tmp_path, verb, "stage=pretrain", "data=sample", "model=auto", "hardware=cpu", expect=2)
    assert done.stderr.strip().endswith("model.path has no value; add model.path=VALUE.")
    assert not (tmp_path / "outputs").exists()
