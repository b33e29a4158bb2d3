"""Several adapters at once: those in a row, those trained apart, and those of which one holds the other already."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cqlora.base import (
    fingerprint_adapter,
    fingerprint_tokenizer,
    fingerprint_weights,
    read_card,
    seal_card,
)
from cqlora.config.choices import MergeOnto, ModelFormat, Precision
from cqlora.errors import ConfigError, ModelError
from cqlora.merge import MergeConfig, settle_form
from cqlora.system.companions import ACCEPT, hash_companions
from cqlora.weights.merge import Merge, check_what_goes_along, plan_merge, write_merge
from tests.cards import change_card
from tests.weights.adapters import write_adapter, write_tiny_base

ROWS = [300, 305, 17]
SIXTEEN = MergeOnto["16bit"]


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request, tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp(request.param) / "base", tied=request.param == "tied")


def trained(base: Path, folder: Path, seed: int, continued: Path | None = None, **options) -> Path:
    """An adapter with the card that a run on `base` gives it."""
    write_adapter(base, folder, seed, **options)
    lineage = []
    if continued is not None:
        lineage = [
            *read_card(continued)["lineage"],
            {"adapter_sha256": fingerprint_adapter(continued), "how": "continued"},
        ]
    card = {"base": str(base), "base_sha256": fingerprint_weights(base), "lineage": lineage}
    merged = read_card(base).get("merged")
    card |= {"tokenizer_sha256": fingerprint_tokenizer(base)} | ({"base_merged": merged} if merged else {})
    seal_card(folder, card)
    return folder


def plan(base: Path, *adapters: Path) -> Merge:
    return plan_merge(base, list(adapters), SIXTEEN, True, Precision.auto)


def merge(base: Path, output: Path, *adapters: Path, **changed) -> Path:
    config = MergeConfig(base=str(base), adapter=[str(a) for a in adapters], output_dir=str(output), **changed)
    write_merge(plan(base, *adapters), output, settle_form(config))
    return output


def product(adapter: Path, module: str) -> np.ndarray:
    """alpha / rank · B·A in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    up, down = (tensors[f"base_model.model.{module}.lora_{part}.weight"].double().numpy() for part in "BA")
    return config["lora_alpha"] / config["r"] * up @ down


def test_a_continued_adapter_beside_the_one_that_it_holds_is_refused_in_any_order(base, tmp_path):
    first = trained(base, tmp_path / "first", 1)
    second = trained(base, tmp_path / "second", 2, continued=first)
    third = trained(base, tmp_path / "third", 3, continued=second)
    for adapters, whole in (((first, second), second), ((second, first), second), ((first, third), third)):
        with pytest.raises(ModelError, match=rf"would add it twice; use adapter={whole}\.$") as caught:
            plan(base, *adapters)
        assert "\n" not in str(caught.value)
    sibling = trained(base, tmp_path / "sibling", 4, continued=first)
    with pytest.raises(ModelError, match="were continued from one adapter, which would be added twice"):
        plan(base, second, sibling)
    assert plan(base, third).changed()


def test_what_adapters_that_were_trained_apart_add_is_added_up(base, tmp_path):
    first = trained(base, tmp_path / "first", 1)
    second = trained(base, tmp_path / "second", 2, r=2, target_modules=["q_proj", "k_proj"])
    planned = plan(base, first, second)
    assert [note for note in planned.notes if "apart" in note]
    before = load_file(base / "model.safetensors")
    for name, adapters in (("both", (first, second)), ("other order", (second, first))):
        found = load_file(merge(base, tmp_path / name, *adapters) / "model.safetensors")
        for layer in (0, 1):
            for module, by in (("q_proj", (first, second)), ("v_proj", (first,)), ("k_proj", (second,))):
                path = f"model.layers.{layer}.self_attn.{module}"
                expected = before[f"{path}.weight"].double().numpy() + sum(product(adapter, path) for adapter in by)
                np.testing.assert_allclose(found[f"{path}.weight"].double().numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": ROWS},
        {"modules_to_save": ["embed_tokens"]},
        {"use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"], "embeddings": True},
    ],
    ids=["rows", "saved embedding", "dora", "embedding kept whole"],
)
def test_two_adapters_trained_apart_are_refused_where_one_would_lose_its_change(options, base, tmp_path):
    first, second = (trained(base, tmp_path / str(seed), seed, **options) for seed in (1, 2))
    with pytest.raises(ModelError, match=r"was trained apart .* would be lost; merge one of them") as caught:
        plan(base, first, second)
    assert "\n" not in str(caught.value)


def test_rows_of_one_and_matrices_of_another_go_together(base, tmp_path):
    rows = trained(base, tmp_path / "rows", 1, trainable_token_indices=ROWS)
    plain = trained(base, tmp_path / "plain", 2)
    found = load_file(merge(base, tmp_path / "merged", rows, plain) / "model.safetensors")
    alone = load_file(merge(base, tmp_path / "alone", rows) / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(found[name], alone[name])
    assert not torch.equal(found[name], load_file(base / "model.safetensors")[name])


def test_rows_of_a_tied_matrix_are_not_lost_where_another_adapter_parts_it(tmp_path):
    tied = write_tiny_base(tmp_path / "base", tied=True)
    rows = trained(tied, tmp_path / "rows", 1, trainable_token_indices=ROWS)
    head = trained(tied, tmp_path / "head", 2, target_modules=["q_proj", "lm_head"])
    for adapters in ((rows, head), (head, rows)):
        with pytest.raises(ModelError, match=r"trained apart|without a place"):
            plan(tied, *adapters)


def test_an_adapter_on_a_merged_model_follows_what_was_merged_and_keeps_all_rows(base, tmp_path):
    first = trained(base, tmp_path / "first", 1, trainable_token_indices=ROWS)
    between = merge(base, tmp_path / "between", first)
    second = trained(between, tmp_path / "second", 2, trainable_token_indices=ROWS[:1])
    planned = plan(base, first, second)
    assert not planned.notes
    once = load_file(merge(base, tmp_path / "once", first, second) / "model.safetensors")
    twice = load_file(merge(between, tmp_path / "twice", second) / "model.safetensors")
    for name, tensor in once.items():
        torch.testing.assert_close(tensor, twice[name], atol=2e-6, rtol=2e-6)
    name = "model.embed_tokens.weight"
    kept = load_file(first / "adapter_model.safetensors")
    rows = next(tensor for key, tensor in kept.items() if "embed_tokens" in key and "trainable" in key)
    torch.testing.assert_close(once[name][ROWS[1:]], rows[1:])
    with pytest.raises(ModelError, match="another base"):
        plan(base, second)


def test_a_damaged_adapter_is_not_merged(base, tmp_path):
    adapter = trained(base, tmp_path / "adapter", 1)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is not the file that its cqlora\.json"):
        plan(base, adapter)
    change_card(adapter)
    assert plan(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))
    with pytest.raises(ModelError, match=r"adapter_config\.json is not the file that its cqlora\.json"):
        plan(base, adapter)
    (adapter / "cqlora.json").unlink()
    assert len(plan(base, adapter).notes) == 1


@pytest.mark.parametrize("form", [ModelFormat.safetensors, ModelFormat.nf4], ids=lambda form: form.name)
def test_the_fingerprint_that_is_taken_while_writing_is_that_of_the_files(form, base, tmp_path):
    adapter = trained(base, tmp_path / "adapter", 1)
    output = merge(base, tmp_path / "merged", adapter, format=form, max_shard_size="50KB")
    assert read_card(output)["weights_sha256"] == fingerprint_weights(output)
    shutil.copytree(output, tmp_path / "moved")
    assert fingerprint_weights(tmp_path / "moved") == fingerprint_weights(output)


RUN_AGAIN = ACCEPT.replace("{key}", "accept_changed")


def go_along(merge: Merge, *accepted: str) -> None:
    check_what_goes_along(merge, RUN_AGAIN, accepted)


def test_a_file_that_goes_along_and_was_changed_since_the_tuning_is_refused_unless_it_is_accepted(base, tmp_path):
    own = Path(shutil.copytree(base, tmp_path / "own"))
    (own / "generation_config.json").write_text('{"top_p": 0.9}')
    (own / "chat_template.jinja").write_text("{{ messages }}")
    adapter = trained(own, tmp_path / "adapter", 1)
    change_card(adapter, companions=hash_companions(own))
    go_along(plan(own, adapter))
    (own / "generation_config.json").write_text('{"top_p": 0.8}')
    with pytest.raises(
        ModelError, match=r"is not as it was when .*type accept_changed=\[generation_config.json\] to take it as"
    ):
        go_along(plan(own, adapter))
    (own / "chat_template.jinja").unlink()
    (own / "special_tokens_map.json").write_text("{}")
    with pytest.raises(ModelError, match=r"\[chat_template.jinja,generation_config.json,special_tokens_map.json\]"):
        go_along(plan(own, adapter))
    go_along(plan(own, adapter), "chat_template.jinja", "generation_config.json", "special_tokens_map.json")
    (own / "generation_config.json").write_bytes(b'{"top_p": 0.8')
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read as JSON"):
        go_along(plan(own, adapter), "generation_config.json")


def test_what_goes_along_is_compared_with_the_cards_of_the_base_it_was_trained_on(base, tmp_path):
    """The base's own card counts too; an adapter trained on what a merge made has seen that merge's files."""
    own = Path(shutil.copytree(base, tmp_path / "own"))
    first = trained(own, tmp_path / "first", 1)
    merged = merge(own, tmp_path / "merged", first)
    assert read_card(merged)["companions"] == hash_companions(merged)
    second = trained(merged, tmp_path / "second", 2)
    change_card(second, companions=hash_companions(merged))
    (own / "generation_config.json").write_text('{"top_p": 0.9}')
    go_along(plan(own, first, second))
    (merged / "generation_config.json").write_text('{"top_p": 0.9}')
    with pytest.raises(
        ModelError, match=r"merged/generation_config\.json is not as it was when .*merged/cqlora\.json was"
    ):
        go_along(plan(merged, second))


def test_a_card_that_an_older_cqlora_wrote_tells_of_what_it_names_alone(base, tmp_path):
    own = Path(shutil.copytree(base, tmp_path / "own"))
    adapter = trained(own, tmp_path / "adapter", 1)
    named = hash_companions(own)
    change_card(adapter, companions={"tokenizer_config.json": named["tokenizer_config.json"]})
    (own / "generation_config.json").write_text('{"top_p": 0.8}')
    go_along(plan(own, adapter))


def test_only_files_that_go_along_can_be_accepted(tmp_path):
    with pytest.raises(ConfigError, match=r"accept_changed names config\.json, which is no file that goes along"):
        MergeConfig(base="b", adapter="a", output_dir=str(tmp_path / "o"), accept_changed=["config.json"])
