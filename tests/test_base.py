"""A base's fingerprint covers all that decides its numbers; its folder is read no further than its edge."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cqlora.base import fingerprint_tokenizer, fingerprint_weights, read_base, read_card, seal_card
from cqlora.errors import ModelError
from cqlora.system import fingerprints
from cqlora.system.documents import carry_over
from cqlora.system.tensor_files import INDEX
from tests.weights.adapters import load, write_tiny_base


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("made") / "base")


@pytest.fixture
def base(made, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(made, tmp_path / "base"))


def edit(file: Path, **changed) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def settle(file: Path, monkeypatch) -> None:
    """As if the file had last been changed long ago."""
    monkeypatch.setattr(fingerprints, "SETTLED_SECONDS", -3600.0)
    assert file.is_file()


@pytest.mark.parametrize(
    "changed",
    [{"rope_theta": 20_000.0}, {"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}, {"max_position_embeddings": 512}],
    ids=str,
)
def test_a_configuration_that_computes_something_else_is_another_base(changed, base):
    before = fingerprint_weights(base)
    edit(base / "config.json", transformers_version="9", use_cache=False)
    assert fingerprint_weights(base) == before
    edit(base / "config.json", **changed)
    assert fingerprint_weights(base) != before


def test_every_byte_of_every_tensor_counts(base):
    seen, file = {fingerprint_weights(base)}, base / "model.safetensors"
    size = file.stat().st_size
    for place in range(size - 1, size // 3, -size // 40):
        flip(file, place)
        seen.add(fingerprint_weights(base))
        flip(file, place)
    assert len(seen) == 1 + len(range(size - 1, size // 3, -size // 40))


def test_how_tensors_are_spread_over_files_does_not_count(base, tmp_path):
    before = fingerprint_weights(base)
    (base / "model.safetensors").unlink()
    load_from = write_tiny_base(tmp_path / "again")
    load(load_from).save_pretrained(base, max_shard_size="100KB")
    assert (base / INDEX).is_file()
    shutil.copy(load_from / "config.json", base / "config.json")
    assert fingerprint_weights(base) == before


def test_special_tokens_of_another_name_are_another_tokenizer(base):
    before = fingerprint_tokenizer(base)
    edit(base / "tokenizer_config.json", model_max_length=7)
    assert fingerprint_tokenizer(base) == before
    edit(base / "tokenizer_config.json", eos_token="<pad>")
    assert fingerprint_tokenizer(base) != before


def test_a_base_whose_card_says_another_fingerprint_is_refused(base):
    card = {"weights_sha256": fingerprint_weights(base), "tokenizer_sha256": fingerprint_tokenizer(base)}
    seal_card(base, card)
    assert fingerprint_weights(base) == card["weights_sha256"]
    edit(base / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(ModelError, match=r"config\.json or weights changed since cqlora\.json was written"):
        fingerprint_weights(base)


def test_a_card_that_was_changed_is_refused(base):
    seal_card(base, {"first_added_row": 300, "added_rows": 12})
    text = (base / "cqlora.json").read_text()
    (base / "cqlora.json").write_text(text.replace("300", "301"))
    with pytest.raises(ModelError, match="is not as it was written"):
        read_base(base)
    (base / "cqlora.json").write_text(text)
    assert read_card(base)["first_added_row"] == 300


def test_a_file_is_hashed_once_and_again_when_anything_of_it_differs(base, monkeypatch):
    hashed = []
    actual = fingerprints._hash_range
    monkeypatch.setattr(fingerprints, "_hash_range", lambda *place: hashed.append(place) or actual(*place))
    settle(base / "model.safetensors", monkeypatch)
    first = fingerprint_weights(base)
    tensors = len(hashed)
    assert fingerprint_weights(base) == first and len(hashed) == tensors
    times = (base / "model.safetensors").stat()
    flip(base / "model.safetensors", -1)
    # A tool that puts the times back changes the time of change.
    os.utime(base / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint_weights(base) != first and len(hashed) == 2 * tensors


def test_a_file_that_was_just_written_is_not_remembered(base):
    fingerprint_weights(base)
    assert not list((base.parent / "cache").rglob("*.json"))


def test_a_damaged_memory_is_not_believed_and_one_that_cannot_be_written_is_done_without(base, monkeypatch):
    settle(base / "model.safetensors", monkeypatch)
    first = fingerprint_weights(base)
    (kept,) = (base.parent / "cache").rglob("*.json")
    text = kept.read_text()
    digest = next(iter(json.loads(text)["digests"].values()))
    for damaged in (text.replace(digest, "0" * 64), text[:50], "[]", ""):
        kept.write_text(damaged)
        assert fingerprint_weights(base) == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "config.json"))
    assert fingerprint_weights(base) == first


def test_a_decoy_that_the_index_does_not_name_is_refused(base):
    """transformers reads model.safetensors where it is there, whatever the index says."""
    tensors = load_file(base / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, base / "zeros.safetensors")
    (base / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "zeros.safetensors")}))
    for read in (read_base, fingerprint_weights):
        with pytest.raises(ModelError, match="so it holds two models; remove one"):
            read(base)


@pytest.mark.parametrize("place", ["other/{}", "../other/{}", "{parent}/other/{}", "..", "."])
def test_an_index_stays_inside_its_folder(place, base):
    (base.parent / "other").mkdir()
    (base / "other").mkdir()
    for folder in (base.parent / "other", base / "other"):
        shutil.copy(base / "model.safetensors", folder)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    name = place.format("model.safetensors", parent=base.parent)
    (base / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    with pytest.raises(ModelError, match="which is no file of the folder itself"):
        read_base(base)


def test_an_index_and_its_files_name_the_same_tensors_once(base):
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = list(tensors)
    for file in ("a.safetensors", "b.safetensors"):
        save_file(tensors if file < "b" else {names[0]: tensors[names[0]] + 1}, base / file)
    places = dict.fromkeys(tensors, "a.safetensors")
    (base / INDEX).write_text(json.dumps({"weight_map": places | {names[0]: "b.safetensors"}}))
    with pytest.raises(ModelError, match=r"in a\.safetensors and in b\.safetensors"):
        read_base(base)
    (base / INDEX).write_text(json.dumps({"weight_map": places | {"model.unknown": "a.safetensors"}}))
    with pytest.raises(ModelError, match=r"has no model\.unknown though"):
        read_base(base)


def test_a_link_out_of_the_folder_is_not_copied_and_one_of_a_hub_snapshot_is(base):
    target = base.parent / "target"
    target.mkdir()
    (base.parent / "secret").write_text("secret")
    (base / "NOTICE").symlink_to(base.parent / "secret")
    with pytest.raises(ModelError, match=r"NOTICE is a link out of its folder"):
        carry_over(base, target, set())
    (base / "NOTICE").unlink()
    snapshot = base.parent / "hub" / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (base.parent / "hub" / "blobs").mkdir()
    (base.parent / "hub" / "blobs" / "abc").write_text("licence")
    (snapshot / "LICENSE").symlink_to("../../blobs/abc")
    carry_over(snapshot, target, set())
    assert (target / "LICENSE").read_text() == "licence" and not (target / "LICENSE").is_symlink()


def test_a_token_beyond_the_rows_is_refused_where_the_base_is_read(base):
    document = json.loads((base / "tokenizer.json").read_text())
    rows = read_base(base).vocab_size
    for token_id, added in ((rows, True), (10**9, True), (10**9, False)):
        changed = json.loads(json.dumps(document))
        if added:
            changed["added_tokens"].append({"id": token_id, "content": "<far>", "special": True})
        else:
            changed["model"]["vocab"]["far"] = token_id
        (base / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=rf"the id {token_id:,} and the model has {rows:,} rows"):
            read_base(base)
