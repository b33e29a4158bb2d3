"""Checkpoint folders: whole or not there, verified file by file, pruned without losing the last good one."""

import json
from pathlib import Path

import pytest

from cqlora.errors import CheckpointError
from cqlora.train.checkpoint import CheckpointStore, find_damage


def commit(store: CheckpointStore, step: int) -> Path:
    store.stage(step)
    store.write(step, "weights.bin", bytes(range(256)) * step)
    store.write(step, "state.json", json.dumps({"step": step}).encode())
    return store.commit(step)


@pytest.mark.parametrize("name", ["weights.bin", "state.json", "manifest.json"])
@pytest.mark.parametrize("change", ["flip", "truncate", "remove"])
def test_any_damage_to_any_file_is_found_and_the_one_before_is_taken(name, change, tmp_path):
    store = CheckpointStore(tmp_path, keep_last=3)
    older, newer = commit(store, 1), commit(store, 2)
    content = bytearray((newer / name).read_bytes())
    if change == "flip":
        content[3] ^= 4
        (newer / name).write_bytes(content)
    elif change == "truncate":
        (newer / name).write_bytes(content[:-1])
    else:
        (newer / name).unlink()
    rejected = []
    assert store.find_newest(lambda folder, damage: rejected.append((folder, damage))) == older
    assert [folder for folder, _ in rejected] == [newer]
    assert rejected[0][1]


def test_a_staged_checkpoint_counts_for_nothing_and_the_next_clears_it(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    kept = commit(store, 1)
    store.stage(2)
    store.write(2, "weights.bin", b"half")
    assert store.committed() == [kept]
    commit(store, 3)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_pruning_keeps_the_newest_whole_ones_and_never_the_last_of_them(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    for step in (1, 2, 3):
        commit(store, step)
    assert [folder.name for folder in store.committed()] == ["step-00000003"]


def test_pruning_does_not_count_a_damaged_checkpoint_as_kept(tmp_path):
    generous, strict = CheckpointStore(tmp_path, keep_last=9), CheckpointStore(tmp_path, keep_last=2)
    commit(generous, 1)
    damaged = commit(generous, 2)
    (damaged / "weights.bin").write_bytes(b"")
    commit(strict, 3)
    assert [folder.name for folder in strict.committed()] == [
        "step-00000003",
        "step-00000002",
        "step-00000001",
    ]
    assert find_damage(damaged) is not None


def test_writing_to_a_folder_that_refuses_is_a_named_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match="step 1 could not be written"):
        CheckpointStore(tmp_path / "checkpoints", keep_last=1).stage(1)


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        '["state.json"]',
        "null",
        "7",
        "{}",
        '{"state.json": {"sha256": "x"}}',
        '{"state.json": null}',
        '{"../step-00000001/state.json": "x"}',
        '{"/etc/passwd": "x"}',
        '{"": "x"}',
        '{"..": "x"}',
        '{"a\\u0000b": "x"}',
        '{"' + "x" * 5000 + '": "x"}',
        "[" * 100_000,
        " " * (17 << 20),
        "\x00\xff",
    ],
    ids=lambda text: text[:20],
)
def test_a_manifest_of_whatever_form_is_damage_and_follows_no_name_out_of_its_folder(manifest, tmp_path):
    store = CheckpointStore(tmp_path, keep_last=3)
    older, newer = commit(store, 1), commit(store, 2)
    (newer / "manifest.json").write_text(manifest, encoding="latin-1")
    rejected = []
    assert store.find_newest(lambda folder, damage: rejected.append(damage)) == older
    assert len(rejected) == 1 and "manifest.json" in rejected[0] and len(rejected[0]) < 200


def test_what_lies_beside_the_checkpoints_is_left_alone_and_counts_for_nothing(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    (tmp_path / "step-notes.txt").write_text("mine")
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-of-mine").mkdir()
    (tmp_path / "notes.staging").write_text("mine")
    for step in (1, 2):
        newest = commit(store, step)
    assert store.find_newest(lambda folder, damage: pytest.fail(f"{folder}: {damage}")) == newest
    names = {"step-notes.txt", "step-00000009", "step-of-mine", "notes.staging", "step-00000002"}
    assert {each.name for each in tmp_path.iterdir()} == names
