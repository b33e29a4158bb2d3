"""Models by their folders: names, adapters of other bases, and bases held as their adapters were trained on them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cqlora.base import ADAPTER_WEIGHTS
from cqlora.errors import ConfigError, ModelError
from cqlora.evaluation.models import ModelChoice, read_models
from tests.cards import change_card
from tests.evaluation.conftest import build_base
from tests.inference.conftest import build_adapter


def test_a_word_is_a_folder_or_a_base_with_an_adapter(base, adapter, tmp_path):
    odd = tmp_path / "c++"
    odd.mkdir()
    found = read_models([str(base), f"{base}+{adapter}", str(odd)])
    assert [(each.base, each.adapter) for each in found] == [(base, None), (base, adapter), (odd, None)]
    assert [each.name for each in found] == ["base", "base+run", "c++"]


def test_names_that_are_not_apart_become_the_words(base, tmp_path):
    other = str(tmp_path / "base")
    assert [each.name for each in read_models([str(base), other])] == [str(base), other]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a", "a"], "names a model twice"),
        (["a+b", "./a+c/../b"], "names a model twice"),
        (["a+b+c"], "a model takes one adapter"),
        (["+b"], "lacks a folder"),
        (["a+"], "lacks a folder"),
    ],
)
def test_words_that_name_no_model_are_refused(words, told):
    with pytest.raises(ConfigError, match=told):
        read_models(words)


def test_an_adapter_on_another_base_is_refused(adapter, tmp_path):
    other = build_base(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="was trained on another base"):
        ModelChoice("wrong", other, adapter).check()


def test_folders_without_a_model_or_an_adapter_are_refused(base, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        ModelChoice("none", tmp_path / "nowhere").check()
    with pytest.raises(ConfigError, match=r"has no adapter_config.json"):
        ModelChoice("none", base, tmp_path).check()


def test_a_base_is_held_as_the_adapter_beside_it_was_trained_on_it(base, adapter, tmp_path):
    in_nf4 = build_adapter(base, tmp_path / "nf4", quantized=True)
    pissa = Path(shutil.copytree(in_nf4, tmp_path / "pissa"))
    change_card(pissa, trained_on={"quantization": "nf4", "method": "pissa"})

    def held(*words: str) -> list[str]:
        return [each.quantization for each in read_models(list(words))]

    assert held(str(base), f"{base}+{in_nf4}") == ["nf4", "auto"]
    assert held(str(base), f"{base}+{adapter}") == ["auto", "auto"]
    assert held(str(base), f"{base}+{pissa}") == ["auto", "auto"]
    assert held(str(base)) == ["auto"]
    assert [each.quantization for each in read_models([str(base), f"{base}+{in_nf4}"], "none")] == ["none", "none"]
    form = read_models([str(base), f"{base}+{in_nf4}"])[0].open("float32", "cpu").form
    assert form == "NF4 numbers unpacked to float32 on cpu"


def test_fingerprints_tell_models_apart(base, adapter):
    plain, adapted = (each.describe()["fingerprint"] for each in read_models([str(base), f"{base}+{adapter}"]))
    assert plain != adapted
    assert plain == read_models([str(base)])[0].describe()["fingerprint"]


def test_an_adapter_that_adds_nothing_makes_no_difference_however_its_base_was_held(base, adapter, tmp_path):
    """The base by itself is rounded as the base beneath the adapter is, type and double quantisation too."""
    silent = Path(shutil.copytree(adapter, tmp_path / "silent"))
    weights = load_file(silent / ADAPTER_WEIGHTS)
    save_file({name: tensor * ("lora_B" not in name) for name, tensor in weights.items()}, silent / ADAPTER_WEIGHTS)
    held = {"quantization": "nf4", "double_quantization": False, "dtype": "bfloat16"}
    change_card(silent, trained_on=held)
    alone, beside = read_models([str(base), f"{base}+{silent}"])
    ids = list(range(40, 90))
    logits = [each.open("float32", "cpu")._decoder.all_logits(ids) for each in (alone, beside)]
    assert torch.equal(*logits)
