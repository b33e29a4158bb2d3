"""A signal at planted points of a run's life: 75 or a clean end, nothing half-written, and run again it goes on."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import cqlora.model.adapters
import cqlora.train.run
import cqlora.train.trainer
from cqlora.train.checkpoint import CheckpointStore
from tests.conftest import ROOT
from tests.runs import SMALL, adapter_sha256, events, finish_run, losses, typed_run

SHORT = ("stage=pretrain", "stage.max_steps=3", "stage.checkpoint_every_steps=2")


def ask(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def plant(module, name: str, number: int, before: bool = True, times: int = 1) -> None:
    """Let a function send its own process a signal when it is called, or has returned, for the first time."""
    original = getattr(module, name)
    calls = []

    def call(*arguments, **options):
        calls.append(1)
        if before and len(calls) == 1:
            for _ in range(times):
                ask(number)
        result = original(*arguments, **options)
        if not before and len(calls) == 1:
            ask(number)
        return result

    setattr(module, name, call)


def at_the_base() -> None:
    plant(cqlora.train.run, "open_base", signal.SIGTERM)


def at_the_cache() -> None:
    plant(cqlora.train.run, "prepare_cache", signal.SIGINT)


def at_the_model() -> None:
    plant(cqlora.train.run, "open_model", signal.SIGUSR2, before=False)


def at_the_first_evaluation() -> None:
    plant(cqlora.train.trainer, "sum_losses", signal.SIGTERM, before=False)


@pytest.fixture(scope="module")
def uninterrupted(workspace: Path) -> Path:
    folder = workspace / "not-stopped"
    assert finish_run(typed_run(workspace, *SHORT), folder) == 0
    return folder


@pytest.mark.parametrize(
    "point, name",
    [
        (at_the_base, "SIGTERM"),
        (at_the_cache, "SIGINT"),
        (at_the_model, "SIGUSR2"),
        (at_the_first_evaluation, "SIGTERM"),
    ],
)
def test_before_the_first_step_a_signal_ends_the_run_with_75_and_it_starts_again(
    point, name, workspace, tmp_path, uninterrupted
):
    config = typed_run(workspace, *SHORT)
    assert finish_run(config, tmp_path, point) == 75
    assert f"stopped by {name}; the same command with hydra.run.dir=" in (tmp_path / "stderr.txt").read_text()
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "adapter").exists()
    assert finish_run(config, tmp_path) == 0
    assert losses(tmp_path) == losses(uninterrupted) and adapter_sha256(tmp_path) == adapter_sha256(uninterrupted)


def in_the_midst_of_a_commit() -> None:
    plant(CheckpointStore, "commit", signal.SIGUSR2)


def in_the_midst_of_the_final_save() -> None:
    plant(cqlora.model.adapters, "save_file", signal.SIGTERM, times=2)


def test_in_a_commit_it_is_finished_and_one_more_step_is_committed(workspace, tmp_path, uninterrupted):
    config = typed_run(workspace, *SHORT, "stage.max_steps=4", "stage.schedule=constant")
    assert finish_run(config, tmp_path, in_the_midst_of_a_commit) == 75
    assert [folder.name for folder in CheckpointStore(tmp_path / "checkpoints", 9).committed()] == [
        "step-00000003",
        "step-00000002",
    ]
    assert events(tmp_path)[-1] == "preempted"


def test_in_the_final_save_the_save_is_finished_and_the_run_has_ended_well(workspace, tmp_path, uninterrupted):
    assert finish_run(typed_run(workspace, *SHORT), tmp_path, in_the_midst_of_the_final_save) == 0
    assert adapter_sha256(tmp_path) == adapter_sha256(uninterrupted)
    assert not list(tmp_path.glob(".adapter*"))


PLANT = """
import os, sys, time
place, module, numbers, done = os.environ["PLANT"].split(":")
is_worker = "cqlora.train" in sys.orig_argv
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module and is_worker == (place == "worker"):
            sys.meta_path.remove(self)
            open(done, "a").write(f"{os.getpid()}\\n")
            for number in numbers.split(","):
                try:
                    os.kill(os.getppid() if is_worker else os.getpid(), int(number))
                    while is_worker:
                        time.sleep(0.02)
                except BaseException as error:
                    heard = error
            raise heard
if not any("resource_tracker" in each for each in sys.orig_argv):
    sys.meta_path.insert(0, Finder())
"""


def run_planted(folder: Path, place: str, module: str, numbers: str, *overrides: str) -> subprocess.CompletedProcess:
    """A run in whose command, or in whose worker, the import of `module` sends the command signals."""
    planted = folder / "planted"
    planted.mkdir(exist_ok=True)
    (planted / "sitecustomize.py").write_text(textwrap.dedent(PLANT))
    environment = {**os.environ, "PYTHONPATH": f"{planted}{os.pathsep}{ROOT}"}
    environment["PLANT"] = f"{place}:{module}:{numbers}:{planted / 'done'}"
    command = [sys.executable, "-m", "cqlora.run", *SMALL, *SHORT, *overrides]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.parametrize("module, number", [("hydra", signal.SIGUSR2), ("cqlora.launch.start", signal.SIGINT),
                                            ("torch", signal.SIGTERM)])  # fmt: skip
def test_while_a_command_still_imports_a_signal_ends_it_with_75_and_leaves_no_folder(module, number, tmp_path):
    done = run_planted(tmp_path, "command", module, str(int(number)))
    assert done.returncode == 75, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: stopped by {number.name}") and "Traceback" not in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("layout", [("hardware=2xcpu", "stage.global_batch_size=2"), ("--multirun", "seed=1,2")])
def test_workers_and_the_jobs_of_a_sweep_end_with_75_and_no_job_comes_after(layout, tmp_path):
    done = run_planted(tmp_path, "worker", "torch", str(int(signal.SIGTERM)), *layout)
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGTERM" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("run.yaml"))
    started = (tmp_path / "planted" / "done").read_text().split()
    assert len(started) == 1 or "--multirun" not in layout


@pytest.mark.parametrize("place", ["command", "worker"])
def test_a_second_ctrl_c_ends_at_once(place, tmp_path):
    number = int(signal.SIGINT)
    layout = ("hardware=2xcpu", "stage.global_batch_size=2") if place == "worker" else ()
    done = run_planted(tmp_path, place, "torch", f"{number},{number}", *layout)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
