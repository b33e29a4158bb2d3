"""Nothing is written before a run is accepted, and what is refused leaves nothing behind."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from cqlora.errors import ModelError
from cqlora.random_base import is_to_be_built
from tests.conftest import run_verb
from tests.runs import SMALL, finish_run, typed_run

RUN = [each for each in SMALL if not each.startswith("tracking")]
SHORT = ("stage=pretrain", "stage.max_steps=2", "stage.checkpoint_every_steps=1", "stage.keep_last=2")


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file under a folder."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def finished(workspace: Path) -> Path:
    """A finished run's folder, to be copied."""
    folder = workspace / "finished"
    assert finish_run(typed_run(workspace, *SHORT), folder) == 0
    (folder / "stderr.txt").unlink()
    return folder


def refuse(workspace: Path, folder: Path, *overrides: str, code: int = 1) -> str:
    """A command that ends with `code`, whose folder is as it was; its one sentence."""
    before = contents(folder)
    paths = (f"model.path={workspace}/models/tiny", f"data.cache_dir={workspace}/cache", f"hydra.run.dir={folder}")
    done = run_verb(workspace, "run", *RUN, *SHORT, "tracking=wandb", *paths, *overrides, expect=code)
    assert contents(folder) == before
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in done.stderr
    return last


def test_a_refused_command_leaves_a_finished_folder_and_its_tracker_as_they_were(workspace, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    assert "stage.learning_rate was 0.0002 and is 0.1" in refuse(workspace, folder, "stage.learning_rate=0.1")
    # Nor do workers of their own write there: the sweep's job is one.
    assert "resume=never would overwrite" in refuse(workspace, folder, "stage.resume=never")


def test_a_checkpoint_that_is_asked_for_by_name_is_verified(workspace, finished, tmp_path):
    damaged = tmp_path / "step-00000001"
    shutil.copytree(finished / "checkpoints" / "step-00000001", damaged)
    content = bytearray((damaged / "optimizer-rank0.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "optimizer-rank0.pt").write_bytes(content)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    message = refuse(workspace, folder, f"stage.resume={damaged}")
    assert "is damaged: optimizer-rank0.pt is not as it was written" in message


def test_a_run_of_workers_or_a_sweep_that_is_refused_leaves_no_folder(workspace):
    for overrides in (
        ("stage.init_adapter=nowhere",),
        ("hardware=2xcpu", "stage.global_batch_size=2", "stage.resume=nowhere"),
    ):
        paths = (f"model.path={workspace}/models/tiny", f"data.cache_dir={workspace}/cache")
        run_verb(workspace, "run", *RUN, *SHORT, *paths, *overrides, expect=1)
        assert not (workspace / "outputs").exists()
    sweep = ("stage.init_adapter=nowhere", "hydra.sweep.dir=swept/here", "--multirun", "seed=1,2")
    run_verb(workspace, "run", *RUN, *SHORT, *paths, *sweep, expect=1)
    assert not (workspace / "swept").exists()


def test_a_folder_that_was_there_before_stays_though_the_run_is_refused(workspace, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    refuse(workspace, folder, "stage.init_adapter=nowhere")
    assert folder.is_dir() and not list(folder.iterdir())


def test_a_run_folder_that_cannot_be_is_one_sentence(call_verb, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for folder, words in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "is a file"),
        (tmp_path / "link", "is a link to"),
        (tmp_path / "link" / "below", "is a link to"),
        (tmp_path / ("x" * 300), "file name too long"),
        (Path("/proc/run"), "/proc/run"),
    ):
        for key in ("hydra.run.dir", "hydra.sweep.dir"):
            swept = ["--multirun"] if key == "hydra.sweep.dir" else []
            done = call_verb(tmp_path, "run", *SMALL, *SHORT, f"{key}={folder}", *swept, expect=2)
            assert done.stderr.startswith("error: the run cannot be written to ") and done.stderr.count("\n") == 1
            assert words in done.stderr and "choose another folder" in done.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("path", ["models/tinny", r"C:\models\llama", "tiny", "/data/llama"])
def test_random_weights_are_made_nowhere_but_at_the_default_path_of_the_tiny_model(path, workspace, tmp_path):
    model = typed_run(workspace, "stage=pretrain").model
    model.path = str(tmp_path / "models" / "tiny")
    assert is_to_be_built(model)
    model.path = path
    with pytest.raises(ModelError, match="does not exist, and model=tiny makes random weights at models/tiny only"):
        is_to_be_built(model)


def test_the_log_says_random_weights_and_where_the_run_is_and_folds_no_path(workspace, tmp_path):
    folder = tmp_path / ("long" * 30)
    paths = (f"model.path={workspace}/models/tiny", f"data.cache_dir={workspace}/cache", f"hydra.run.dir={folder}")
    done = run_verb(workspace, "run", *RUN, *SHORT, "tracking=wandb", *paths)
    message = [line.partition(" ")[2] for line in done.stderr.splitlines()]
    assert any(line.startswith(f"base {workspace}/models/tiny: random weights") for line in message)
    assert f"run {folder}: importing torch" in message and f"adapter written to {folder}/adapter" in message
    assert f"upload it with: wandb sync {folder}/wandb/offline-run-*" in message
    assert any(line.startswith("step 1 of 2  loss ") for line in message)
    assert any(line.startswith("step 2 of 2  loss ") for line in message)
    assert sum(line.startswith("step 0  sample_") for line in message) == 2
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["kind"] == "eval"
