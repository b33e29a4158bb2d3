"""Scaled and averaged adapters, beside the same computed in float64 from whole matrices."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cqlora.base import read_card
from cqlora.config.choices import MergeOnto, Precision
from cqlora.errors import ConfigError, ModelError
from cqlora.merge import MergeConfig
from cqlora.system import shards
from cqlora.weights.merge import plan_merge, write_merge
from cqlora.weights.merge_changes import RowFeed
from tests.conftest import run_verb
from tests.weights.adapters import load, write_adapter, write_tiny_base

ADDED = range(300, 312)
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [301, 17, 305], "lm_head": [301, 17, 305]}},
    "saved whole": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory) -> Path:
    """A base of which rows 300 to 311 are of new tokens."""
    folder = write_tiny_base(tmp_path_factory.mktemp("blend") / "base", tied=request.param)
    (folder / "cqlora.json").write_text(json.dumps({"first_added_row": ADDED.start, "added_rows": len(ADDED)}))
    return folder


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of rows that begin and end within the added rows, as on a real matrix."""
    monkeypatch.setattr(shards, "READ_BYTES", 5000)


def merge(base: Path, adapters: list[Path], output: Path, averaged: bool = False, weight: float = 1.0) -> Path:
    onto = MergeOnto["16bit"]
    given = {"adapter_average": list(map(str, adapters))} if averaged else {"adapter": list(map(str, adapters))}
    plan = plan_merge(base, adapters, onto, True, Precision.auto, averaged, weight)
    options = MergeConfig(base=str(base), output_dir=str(output), adapter_weight=weight, **given)
    write_merge(plan, output, options)
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every matrix in float64, of both embeddings."""
    return {name: tensor.double() for name, tensor in load(folder).state_dict().items()}


def expect(base: Path, merged_alone: list[Path], weight: float) -> dict[str, torch.Tensor]:
    """base + weight · mean of what each adds; of added rows the mean of what each has."""
    before, alone = weights(base), [weights(folder) for folder in merged_alone]
    expected = {}
    for name, matrix in before.items():
        mean = torch.stack([each[name] for each in alone]).mean(dim=0)
        expected[name] = matrix + weight * (mean - matrix)
        if "embed_tokens" in name or "lm_head" in name:
            expected[name][ADDED.start : ADDED.stop] = mean[ADDED.start : ADDED.stop]
    return expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_the_average_of_adapters_is_that_of_what_they_add_at_their_weight(kind, weight, base, tmp_path):
    adapters = [write_adapter(base, tmp_path / f"{seed}", seed=seed, **KINDS[kind]) for seed in (1, 2, 3)]
    alone = [merge(base, [adapter], tmp_path / f"alone{number}") for number, adapter in enumerate(adapters)]
    found = weights(merge(base, adapters, tmp_path / "average", averaged=True, weight=weight))
    expected = expect(base, alone, weight)
    for name, matrix in expected.items():
        torch.testing.assert_close(found[name], matrix, atol=3e-6, rtol=1e-6, msg=name)
    assert any((found[name] - before).abs().max() > 1e-2 for name, before in weights(base).items())


def test_averaged_factors_would_have_been_another_model(base, tmp_path):
    """What 2507.17634 warns of: the product of mean factors is not the mean of products."""
    adapters = [write_adapter(base, tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    stored = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    up, down = ([each[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{f}.weight"] for each in stored]
                for f in "BA")  # fmt: skip
    factors = 2.0 * (up[0] + up[1]) @ (down[0] + down[1]) / 4
    name = "model.layers.0.self_attn.q_proj.weight"
    added = weights(merge(base, adapters, tmp_path / "average", averaged=True))[name] - weights(base)[name]
    products = 2.0 * (up[0].double() @ down[0].double() + up[1].double() @ down[1].double()) / 2
    torch.testing.assert_close(added, products, atol=1e-6, rtol=1e-5)
    assert (added - factors).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_scales_all_but_the_rows_of_new_tokens(kind, base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter", **KINDS[kind])
    alone = merge(base, [adapter], tmp_path / "alone")
    found = weights(merge(base, [adapter], tmp_path / "half", weight=0.5))
    for name, matrix in expect(base, [alone], 0.5).items():
        torch.testing.assert_close(found[name], matrix, atol=2e-6, rtol=1e-6, msg=name)


def test_adapters_of_several_ranks_and_kinds_can_be_averaged(base, tmp_path):
    kinds = [{"r": 2}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}]
    adapters = [write_adapter(base, tmp_path / f"{number}", **kind) for number, kind in enumerate(kinds)]
    alone = [merge(base, [adapter], tmp_path / f"alone{number}") for number, adapter in enumerate(adapters)]
    found = weights(merge(base, adapters, tmp_path / "average", averaged=True))
    for name, matrix in expect(base, alone, 1.0).items():
        torch.testing.assert_close(found[name], matrix, atol=2e-6, rtol=1e-6, msg=name)


def test_the_card_says_what_was_averaged_at_which_weight_and_an_adapter_of_it_belongs_nowhere_else(base, tmp_path):
    adapters = [write_adapter(base, tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    card = read_card(merge(base, adapters, tmp_path / "average", averaged=True, weight=0.5))
    (entry,) = card["merged"]["adapters"]
    assert len(entry["average_of"]) == 2 and entry["weight"] == 0.5
    assert card["merged_from"] == list(map(str, adapters))
    (plain,) = read_card(merge(base, adapters[:1], tmp_path / "plain"))["merged"]["adapters"]
    assert sorted(plain) == ["onto", "sha256"]


def test_adapters_of_one_past_are_averaged_though_they_could_not_be_added_up(base, tmp_path):
    first = write_adapter(base, tmp_path / "first")
    second = tmp_path / "second"
    shutil.copytree(first, second)
    with pytest.raises(ModelError, match=r"add it twice|added twice"):
        merge(base, [first, second], tmp_path / "sum")
    one = weights(merge(base, [first], tmp_path / "one"))
    both = weights(merge(base, [first, second], tmp_path / "mean", averaged=True))
    for name, matrix in one.items():
        torch.testing.assert_close(both[name], matrix, atol=1e-6, rtol=1e-6, msg=name)


def test_rows_are_fed_however_blocks_are_cut():
    matrix = torch.arange(26.0).reshape(13, 2)
    for sizes in ([13], [1] * 13, [5, 5, 3], [2, 7, 4]):
        feed = RowFeed(iter(matrix.split(sizes)))
        taken = [feed.take(count) for count in (3, 1, 6, 3)]
        assert torch.equal(torch.cat(taken), matrix)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"adapter": "a", "run": "r"}, "adapter= and run= both say what to merge"),
        ({"adapter_average": ["a"]}, "its own mean; use adapter=FOLDER"),
        ({"adapter_average": ["a", "a"]}, "names a folder twice"),
        ({"adapter": "a", "last": 3}, "last=3 has no effect without run=FOLDER"),
        ({"adapter": "a", "adapter_weight": 0.0}, "adapter_weight=0.0 is out of range"),
        ({"adapter_weight": 0.5, "format": "gguf"}, "adapter_weight=0.5 has no effect without an adapter"),
        ({}, "merges nothing"),
    ],
)
def test_options_that_contradict_are_refused(changed, words):
    from cqlora.config.choices import ModelFormat

    changed = changed | ({"format": ModelFormat.gguf} if "format" in changed else {})
    with pytest.raises(ConfigError, match=words):
        MergeConfig(base="b", output_dir="o", **changed)


def test_a_sweep_over_the_weight_writes_a_folder_for_each(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter")
    run_verb(
        tmp_path, "merge", f"base={base}", f"adapter={adapter}", "adapter_weight=0.5,0.75",
        "output_dir=out/weight_${adapter_weight}", "--multirun",
    )  # fmt: skip
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["weight_0.5", "weight_0.75"]
