"""A run that was killed, at any moment, is the run that never was: losses and adapter equal to the last bit."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import cqlora.train.checkpoint
import cqlora.train.run
import cqlora.train.state
import cqlora.train.trainer
from cqlora.errors import CheckpointError
from cqlora.train.checkpoint import CheckpointStore
from cqlora.train.resumption import choose_start
from cqlora.train.run import has_ended
from tests.runs import (
    adapter_sha256,
    build_base,
    build_once,
    events,
    finish_run,
    kill,
    losses,
    read_state,
    start_run,
    typed_run,
    wait_for_step,
)

STEPS = 12
SHORT = (f"stage.max_steps={STEPS}", "stage.checkpoint_every_steps=3")


@pytest.fixture(scope="module")
def uninterrupted(workspace: Path) -> Path:
    def train(folder: Path) -> None:
        assert finish_run(typed_run(workspace, "stage=pretrain", *SHORT), folder) == 0
        assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))

    return build_once(workspace / "uninterrupted", train)


def assert_same_run(folder: Path, reference: Path) -> None:
    assert losses(folder) == losses(reference)
    assert adapter_sha256(folder) == adapter_sha256(reference)
    cards = [(run / "adapter" / "README.md").read_text(encoding="utf-8") for run in (folder, reference)]
    assert cards[0] == cards[1]


def test_killed_at_random_moments_and_resumed_it_equals_an_uninterrupted_run(workspace, tmp_path, uninterrupted):
    config = typed_run(workspace, "stage=pretrain", *SHORT)
    moments = random.Random(os.environ.get("PYTEST_RANDOM", "1"))
    for after in sorted(moments.sample(range(1, STEPS), 3)):
        child = start_run(config, tmp_path)
        wait_for_step(child, tmp_path, after)
        time.sleep(moments.random() * 0.2)
        kill(child)
    assert finish_run(config, tmp_path) == 0
    assert "resumed" in events(tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def kill_before_manifest() -> None:
    """Die when the second checkpoint's files are written and its manifest is not."""
    original = cqlora.train.checkpoint.write_durably

    def write(file: Path, content: bytes) -> None:
        if file.name == "manifest.json" and "step-00000006" in str(file):
            os.kill(os.getpid(), signal.SIGKILL)
        original(file, content)

    cqlora.train.checkpoint.write_durably = write


def kill_half_way_through_a_file() -> None:
    original = cqlora.train.checkpoint.write_durably

    def write(file: Path, content: bytes) -> None:
        if file.name.startswith("optimizer") and "step-00000006" in str(file):
            original(file, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        original(file, content)

    cqlora.train.checkpoint.write_durably = write


def kill_after_rename() -> None:
    """Die when the second checkpoint counts already, before older ones are pruned."""
    original = CheckpointStore._prune

    def prune(self: CheckpointStore) -> None:
        if (self.root / "step-00000006").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        original(self)

    CheckpointStore._prune = prune


@pytest.mark.parametrize(
    "plant, left_at", [(kill_before_manifest, 3), (kill_half_way_through_a_file, 3), (kill_after_rename, 6)]
)
def test_killed_inside_a_save_it_resumes_from_a_whole_checkpoint(plant, left_at, workspace, tmp_path, uninterrupted):
    config = typed_run(workspace, "stage=pretrain", *SHORT)
    assert finish_run(config, tmp_path, plant) == -signal.SIGKILL
    newest = CheckpointStore(tmp_path / "checkpoints", 2).find_newest(lambda folder, damage: None)
    assert newest is not None and read_state(newest)["step"] == left_at
    assert finish_run(config, tmp_path) == 0
    assert_same_run(tmp_path, uninterrupted)


def test_a_flipped_byte_makes_it_fall_back_to_the_checkpoint_before_and_say_so(workspace, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / f"step-{STEPS:08d}"
    flip_a_byte(newest / "optimizer-rank0.pt")
    shutil.copy(uninterrupted / "metrics.jsonl", tmp_path)
    assert finish_run(typed_run(workspace, "stage=pretrain", *SHORT), tmp_path) == 0
    assert events(tmp_path).count("damaged_checkpoint") == 1
    assert "optimizer-rank0.pt is not as it was written" in (tmp_path / "metrics.jsonl").read_text()
    assert_same_run(tmp_path, uninterrupted)


def test_sigterm_finishes_the_step_commits_and_exits_75_and_the_run_goes_on(workspace, tmp_path, uninterrupted):
    config = typed_run(workspace, "stage=pretrain", *SHORT)
    assert finish_run(config, tmp_path, ask_to_stop_in_step_4) == 75
    stopped_at = losses(tmp_path)[-1][0]
    assert 4 <= stopped_at < STEPS
    assert (tmp_path / "checkpoints" / f"step-{stopped_at:08d}" / "manifest.json").is_file()
    assert events(tmp_path)[-1] == "preempted"
    assert finish_run(config, tmp_path) == 0
    assert_same_run(tmp_path, uninterrupted)


def ask_to_stop_in_step_4() -> None:
    """SIGTERM to itself in the middle of a step."""
    original = cqlora.train.trainer.Trainer.accumulate

    def accumulate(self, *arguments):
        if self.counters.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    cqlora.train.trainer.Trainer.accumulate = accumulate


def plant_nan_at_step_5() -> None:
    """The gradient of step 5 has one NaN in it."""
    original = torch.nn.utils.clip_grad_norm_
    calls = []

    def clip(parameters, *arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            parameters[0].grad.view(-1)[0] = float("nan")
        return original(parameters, *arguments, **options)

    torch.nn.utils.clip_grad_norm_ = clip


def plant_nan_from_step_5() -> None:
    original = torch.nn.utils.clip_grad_norm_
    calls = []

    def clip(parameters, *arguments, **options):
        calls.append(1)
        if len(calls) >= 5:
            parameters[0].grad.view(-1)[0] = float("nan")
        return original(parameters, *arguments, **options)

    torch.nn.utils.clip_grad_norm_ = clip


def test_a_nan_is_skipped_recorded_and_never_reaches_the_disk(workspace, tmp_path):
    from safetensors.torch import load_file

    assert finish_run(typed_run(workspace, "stage=pretrain", *SHORT), tmp_path, plant_nan_at_step_5) == 0
    assert events(tmp_path).count("skipped_step") == 1
    assert 5 not in dict(losses(tmp_path)) and 6 in dict(losses(tmp_path))
    written = [*tmp_path.glob("checkpoints/*/*.safetensors"), *tmp_path.glob("adapter/*.safetensors")]
    assert len(written) == 3
    for file in written:
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_nan_after_nan_stops_the_run_and_leaves_the_last_good_checkpoint(workspace, tmp_path):
    config = typed_run(workspace, "stage=pretrain", *SHORT, "stage.max_bad_steps=2")
    assert finish_run(config, tmp_path, plant_nan_from_step_5) == 1
    message = (tmp_path / "stderr.txt").read_text()
    assert "2 steps in a row were not finite" in message and "step-00000003 stands" in message
    assert [folder.name for folder in CheckpointStore(tmp_path / "checkpoints", 2).committed()] == ["step-00000003"]


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 400 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs more rights than this user has")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_a_named_error_and_leaves_the_last_checkpoint_whole(workspace, small_disk, uninterrupted):
    config = typed_run(workspace, "stage=pretrain", *SHORT, "stage.keep_last=9")
    assert finish_run(config, small_disk) == 1
    message = (small_disk / "stderr.txt").read_text()
    assert "could not be written" in message and "No space left on device" in message and "stands" in message
    store = CheckpointStore(small_disk / "checkpoints", 9)
    newest = store.find_newest(lambda folder, damage: pytest.fail(f"{folder} is damaged: {damage}"))
    assert newest is not None
    assert not list(small_disk.glob("checkpoints/*.staging"))


@pytest.mark.parametrize(
    "changed, named",
    [
        ("stage.learning_rate=3e-4", "stage.learning_rate was 0.0002 and is 0.0003"),
        ("lora.dropout=0.2", "lora.dropout was 0.1 and is 0.2"),
        ("stage.sequence_length=128", "token_cache was"),
        ("stage.max_steps=20", f"total_steps was {STEPS} and is 20"),
        ("stage.resume=never", "resume=never would overwrite"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(changed, named, workspace, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    before = (folder / "metrics.jsonl").read_bytes()
    assert finish_run(typed_run(workspace, "stage=pretrain", *SHORT, changed), folder) == 1
    assert named in (folder / "stderr.txt").read_text()
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_what_changes_no_result_may_change_between_stop_and_resume(workspace, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    changed = (
        "stage.keep_last=5",
        "stage.checkpoint_every_steps=4",
        "stage.eval_tokens=100",
        "data.workers=1",
    )
    assert finish_run(typed_run(workspace, "stage=pretrain", *SHORT, *changed), folder) == 0
    # Not the card: it tells what the last evaluation measured, which was on other text.
    assert losses(folder) == losses(uninterrupted)
    assert adapter_sha256(folder) == adapter_sha256(uninterrupted)


def test_a_record_that_was_damaged_is_told_before_anything_changes_and_can_be_moved_away(
    workspace, tmp_path, uninterrupted
):
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    record = folder / "metrics.jsonl"
    damaged = record.read_bytes().replace(b'"step": 4, "loss": ', b'"step": 4, "loss": 1')
    assert damaged != record.read_bytes()
    record.write_bytes(damaged)
    config = typed_run(workspace, "stage=pretrain", *SHORT)
    assert finish_run(config, folder) == 1
    told = (folder / "stderr.txt").read_text()
    assert "metrics.jsonl is damaged" in told and f"mv {record} {record}.damaged" in told
    assert record.read_bytes() == damaged
    record.rename(f"{record}.damaged")
    assert finish_run(config, folder) == 0
    assert [step for step, _ in losses(folder)] == [10, 11, 12]
    assert adapter_sha256(folder) == adapter_sha256(uninterrupted)


def test_files_beside_the_weights_are_those_of_the_start_unless_a_change_is_accepted(workspace, tmp_path):
    base = build_base(workspace, tmp_path / "base", tied=False)
    (base / "cqlora.json").unlink()
    short = ("stage.max_steps=4", "stage.checkpoint_every_steps=2", f"model.path={base}")
    config = typed_run(workspace, "stage=pretrain", *short)
    assert finish_run(config, tmp_path / "run") == 0
    (base / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert finish_run(config, tmp_path / "run") == 1
    told = (tmp_path / "run" / "stderr.txt").read_text()
    assert f"{base}/generation_config.json is not as it was when" in told
    accepted = "model.accept_changed=[generation_config.json]"
    assert f"type {accepted} to take it as it is now" in told
    assert finish_run(typed_run(workspace, "stage=pretrain", *short, accepted), tmp_path / "run") == 0


def test_several_damaged_checkpoints_and_no_whole_one_is_an_error_not_a_new_start(workspace, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    for folder in (tmp_path / "checkpoints").iterdir():
        flip_a_byte(folder / "state.json")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        CheckpointStore(tmp_path / "checkpoints", 2).find_newest(lambda folder, damage: None)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_run_of_another_stage_in_the_folder_is_told_by_its_name(workspace, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    assert finish_run(typed_run(workspace, "stage=sft", *SHORT), folder) == 1
    told = (folder / "stderr.txt").read_text()
    assert "is of a run of stage=pretrain, and this is stage=sft; give another folder" in told
    assert "token_cache" not in told


def test_a_finished_run_that_is_started_again_says_so_and_changes_nothing(
    workspace, tmp_path, uninterrupted, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    config = typed_run(workspace, "stage=pretrain", *SHORT)
    before = (folder / "metrics.jsonl").read_bytes()
    assert finish_run(config, folder) == 0
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert_same_run(folder, uninterrupted)
    said: list[str] = []
    monkeypatch.setattr(cqlora.train.run.logger, "info", lambda text, *values: said.append(text % values))
    start = choose_start("auto", folder)
    assert has_ended(config, start, STEPS, folder) and not has_ended(config, start, STEPS + 1, folder)
    assert len(said) == 1 and said[0].startswith(f"{folder} has finished already, after {STEPS} steps")
    shutil.rmtree(folder / "adapter")
    assert not has_ended(config, start, STEPS, folder)
