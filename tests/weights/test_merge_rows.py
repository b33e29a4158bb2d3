"""`merge rows=only`: base and plain adapter together are the base and adapter that were given, as vLLM loads them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from cqlora.base import fingerprint_adapter, fingerprint_weights, read_card
from cqlora.config.choices import MergeOnto, MergeRows, Precision
from cqlora.errors import ConfigError, ModelError
from cqlora.merge import MergeConfig, merge
from cqlora.model.fused.linear import keep_trainable_layout
from cqlora.weights import merge_rows
from tests.cards import change_card
from tests.conftest import run_verb
from tests.weights.adapters import attach, load, logits, write_adapter

pytestmark = pytest.mark.usefixtures("_small_blocks")

ROWS = [300, 17, 305]
BOTH = {"embed_tokens": ROWS, "lm_head": ROWS}
KINDS = {
    "rows": {"trainable_token_indices": ROWS},
    "rows of both": {"trainable_token_indices": BOTH},
    "other rows of each": {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": [5]}},
    "rows of the head": {"trainable_token_indices": {"lm_head": ROWS}},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved head and norms": {"modules_to_save": ["lm_head", "norm", "input_layernorm"]},
    "LoRA on both embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "rsLoRA": {"trainable_token_indices": BOTH, "use_rslora": True},
    "patterns": {
        "trainable_token_indices": BOTH,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 3},
    },
    "rsLoRA, patterns": {"trainable_token_indices": BOTH, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "patterns alone": {"rank_pattern": {"q_proj": 2}},
    "one layer of two": {"trainable_token_indices": BOTH, "layers_to_transform": [1]},
}  # fmt: skip
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""What vLLM puts LoRA on in a LLaMA."""


def part(base: Path, adapter: Path, output: Path, **options) -> Path:
    merge(MergeConfig(base=str(base), adapter=str(adapter), output_dir=str(output), rows=MergeRows.only, **options))
    return output


def together(folder: Path) -> torch.Tensor:
    """Logits of what came out, by transformers and PEFT."""
    return logits(attach(load(folder / "base"), folder / "adapter"))


def refusals_of_vllm(folder: Path, max_lora_rank: int) -> list[str]:
    """What vLLM's documented checks of an adapter find (PEFTHelper and LoRAModel.from_local_checkpoint)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found = [f"no {key}" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    found += [f"unsupported {key}" for key in ("modules_to_save", "use_dora") if config.get(key)]
    found += ["bias"] * (config.get("bias", "none") != "none") + ["rank"] * (config["r"] > max_lora_rank)
    # Read by no line of vLLM's loader: it would scale by r and lora_alpha alone, or leave rows as the base has them.
    found += [key for key in ("rank_pattern", "alpha_pattern", "trainable_token_indices") if config.get(key)]
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
            if match is None or match[1].rpartition(".")[2] not in LINEAR:
                found.append(name)
            elif weights.get_slice(name).get_shape()["AB".index(match[2])] != config["r"]:
                found.append(f"rank of {name}")
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_base_and_plain_adapter_have_the_logits_of_what_was_given_and_are_as_vllm_takes_them(
    base, kind, request, tmp_path
):
    base = request.getfixturevalue(base)
    adapter = write_adapter(base, tmp_path / "given", **KINDS[kind])
    expected = logits(attach(load(base), adapter))
    folder = part(base, adapter, tmp_path / "served")
    assert (expected - together(folder)).abs().max() < 1e-4
    assert (expected - logits(load(folder / "base"))).abs().max() > 1e-3
    assert not refusals_of_vllm(folder / "adapter", 8)
    assert {file.name for file in (folder / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "cqlora.json", "README.md",
    }  # fmt: skip
    assert refusals_of_vllm(adapter, 8)


def test_matrices_without_patterns_are_left_bit_for_bit(untied, tmp_path):
    adapter = write_adapter(untied, tmp_path / "given", **KINDS["rsLoRA"])
    given, left = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (adapter, part(untied, adapter, tmp_path / "served") / "adapter")
    )
    assert set(given) - set(left) == {name for name in given if "token_adapter" in name}
    assert left and all(torch.equal(tensor, given[name]) for name, tensor in left.items())


def test_the_card_of_the_plain_adapter_names_the_base_with_the_rows_and_no_other_is_taken(untied, tmp_path):
    adapter = write_adapter(untied, tmp_path / "given", **KINDS["rows of both"])
    change_card(adapter, system_prompt="请用中文回答。", trained_on={"stage": "sft"})
    folder = part(untied, adapter, tmp_path / "served")
    base, plain = folder / "base", folder / "adapter"
    card = read_card(plain)
    assert card["base_sha256"] == fingerprint_weights(base) == read_card(base)["weights_sha256"]
    assert card["system_prompt"] == "请用中文回答。"
    assert card["lineage"] == [{"adapter_sha256": fingerprint_adapter(adapter), "how": "rows_merged"}]
    assert read_card(base)["merged"]["adapters"][-1]["rows"] == "only"
    assert "请用中文回答。" in json.loads((base / "tokenizer_config.json").read_text())["chat_template"]
    with pytest.raises(ModelError, match="trained on another base"):
        merge(MergeConfig(base=str(untied), adapter=str(plain), output_dir=str(tmp_path / "wrong")))
    with pytest.raises(ModelError, match="continued from"):
        merge(MergeConfig(base=str(base), adapter=[str(adapter), str(plain)], output_dir=str(tmp_path / "twice")))


def test_merging_the_plain_adapter_too_gives_what_merging_at_once_gives(untied, tmp_path):
    adapter = write_adapter(untied, tmp_path / "given", **KINDS["patterns"])
    folder = part(untied, adapter, tmp_path / "served")
    for base, given, output in (
        (untied, adapter, tmp_path / "once"), (folder / "base", folder / "adapter", tmp_path / "twice"),
    ):  # fmt: skip
        merge(MergeConfig(base=str(base), adapter=str(given), output_dir=str(output)))
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert once.keys() == twice.keys()
    for name, tensor in once.items():
        torch.testing.assert_close(twice[name], tensor, atol=2e-6, rtol=2e-6, msg=name)


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_of_an_adapter_trained_on_nf4_the_base_is_what_the_nf4_weights_stood_for(base, request, tmp_path):
    base = request.getfixturevalue(base)
    adapter = write_adapter(base, tmp_path / "given", **KINDS["rows"])
    held = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    trained_on = load(base, quantization_config=held)
    keep_trainable_layout(trained_on)
    expected = logits(attach(trained_on, adapter))
    form = {"double_quantization": True, "precision": Precision.float32}
    onto = part(base, adapter, tmp_path / "onto", onto=MergeOnto["nf4"], **form)
    assert (expected - together(onto)).abs().max() < 1e-4
    plain = part(base, adapter, tmp_path / "plain")
    assert (expected - together(plain)).abs().max() > 1e-3


def test_how_the_base_was_held_is_told_of_the_base_that_is_there_now(untied, tmp_path):
    adapter = write_adapter(untied, tmp_path / "given", **KINDS["rows"])
    held = {"quantization": "nf4", "double_quantization": True, "dtype": "bfloat16", "method": "lora", "stage": "sft"}
    change_card(adapter, trained_on=held)
    told = {
        name: read_card(part(untied, adapter, tmp_path / name, onto=MergeOnto[name]) / "adapter")["trained_on"]
        for name in ("16bit", "nf4")
    }
    assert told["16bit"] == held
    assert told["nf4"] == held | {"quantization": "none", "double_quantization": False, "dtype": "float32"}


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ({"use_dora": True, "trainable_token_indices": ROWS}, "is DoRA, which vLLM does not serve"),
        ({"target_modules": ["embed_tokens"]}, "no low-rank matrices to leave"),
        ({"r": 513, "trainable_token_indices": ROWS}, "rank 513, and vLLM serves up to 512"),
        ({}, r"plain LoRA already, .*: vllm serve \S+ --enable-lora --max-lora-rank 8 "),
    ],
)
def test_what_cannot_be_left_beside_the_base_is_refused_and_nothing_is_written(kind, sentence, untied, tmp_path):
    adapter = write_adapter(untied, tmp_path / "given", **kind)
    with pytest.raises(ModelError, match=sentence):
        part(untied, adapter, tmp_path / "served")
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"adapter": ["a", "b"]}, "rows=only parts one adapter"),
        ({"adapter": "a", "format": "gguf"}, "which no GGUF file takes"),
        ({"adapter": "a", "adapter_weight": 0.5}, "adapter_weight= is of adapters that are merged whole"),
        ({"adapter": "a", "measure": __file__}, "measure= is of adapters that are merged whole"),
    ],
)
def test_what_goes_with_whole_merges_alone_is_refused(options, sentence):
    if "format" in options:
        options["format"] = merge_rows.ModelFormat[options["format"]]
    with pytest.raises(ConfigError, match=sentence):
        MergeConfig(base="base", output_dir="out", rows=MergeRows.only, **options)


def test_both_folders_appear_or_neither_does(untied, tmp_path, monkeypatch):
    adapter = write_adapter(untied, tmp_path / "given", **KINDS["rows"])

    def fail(*_):
        raise ModelError("the adapter cannot be written.")

    monkeypatch.setattr(merge_rows, "write_lora", fail)
    with pytest.raises(ModelError, match="cannot be written"):
        part(untied, adapter, tmp_path / "served")
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_the_command_says_how_vllm_serves_what_came_out(untied, tmp_path):
    write_adapter(untied, tmp_path / "given", r=24, **KINDS["rows"])
    shutil.copytree(untied, tmp_path / "base")
    said = run_verb(tmp_path, "merge", "base=base", "adapter=given", "rows=only", "output_dir=zh").stdout
    assert (
        "vllm serve zh/base --enable-lora --max-lora-rank 32 --lora-modules zh=zh/adapter" in said
        and "plain LoRA of rank 24 on 6 matrices" in said
    )
