"""`cqlora.run.train`: a run from a script or a notebook, which finds what is its own as it was."""

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import getbase
from omegaconf.basecontainer import BaseContainer

from cqlora.errors import ConfigError, Preempted, TrainingError
from cqlora.run import train
from cqlora.system.signals import ASKING_TO_END
from tests.conftest import ROOT, run_python
from tests.runs import SMALL, adapter_sha256, events, losses

QUICK = (*SMALL, "stage=sft", "stage.max_steps=2")


@pytest.fixture
def desk(workspace, tmp_path, monkeypatch) -> tuple[str, ...]:
    """An empty current folder; overrides for a run of two steps with models and caches in the shared workspace."""
    monkeypatch.chdir(tmp_path)
    return (*QUICK, f"model.path={workspace}/models/tiny", f"data.cache_dir={workspace}/cache")


def state_of_caller() -> tuple[object, ...]:
    """What a caller has that training, composing or listening to signals may change."""
    signals = [signal.getsignal(number) for number in ASKING_TO_END]
    resolvers = dict(BaseContainer._resolvers)
    return GlobalHydra.instance().hydra, getbase(), resolvers, signals, random.getstate(), dict(os.environ), os.getcwd()


def test_of_two_calls_in_one_process_the_second_changes_nothing_and_both_leave_the_caller_as_it_was(desk, tmp_path):
    code = "import sys; from tests.test_run import call_twice; call_twice(sys.argv[1:])"
    assert run_python(tmp_path, "-c", code, *desk).stdout == "called twice\n"


def call_twice(desk: list[str]) -> None:
    here = Path.cwd()
    (here / "own").mkdir()
    with initialize_config_dir(str(here / "own"), version_base="1.2"):
        before = state_of_caller()
        found: list[Path] = []
        # A notebook's code may run in a thread.
        thread = threading.Thread(target=lambda: found.append(train(desk, folder="runs/a")))
        thread.start()
        thread.join()
        (folder,) = found
        weights, steps, told = adapter_sha256(folder), losses(folder), events(folder)
        assert folder == here / "runs" / "a"
        assert [step for step, _ in steps] == [1, 2]
        assert train(desk, folder=folder) == folder
        after = state_of_caller()
    assert after == before
    assert (adapter_sha256(folder), losses(folder), events(folder)) == (weights, steps, told)
    with pytest.raises(TrainingError, match=r"learning_rate"):
        train([*desk, "stage.learning_rate=0.5"], folder=folder)
    assert adapter_sha256(folder) == weights
    print("called twice")


def test_without_a_folder_the_run_has_one_of_its_own_and_configuration_files_may_be_the_callers(
    desk, tmp_path, monkeypatch, capfd
):
    started: list[tuple[Path, bool]] = []
    monkeypatch.setattr("cqlora.launch.start.run_workers", lambda run_file, hardware: started.append(run_file.parent))
    (tmp_path / "my_configs" / "experiment").mkdir(parents=True)
    (tmp_path / "my_configs" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    seeds: list[int] = []
    monkeypatch.setattr("cqlora.run.tell_notes", lambda config: seeds.append(config.seed))
    folder = train([*desk, "experiment=mine"], config_dir="my_configs")
    assert started == [folder]
    assert folder.parent == tmp_path / "outputs" / "sft"
    assert seeds == [7]
    assert train([*desk, "hydra.run.dir=chosen/here"]) == tmp_path / "chosen" / "here"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert train(desk, folder="~/run") == tmp_path / "home" / "run"
    # Nobody trained, so nothing is left.
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "home").exists()


REFUSED = {
    "stage has no default": (["model=tiny"], {}),
    "stage.learning_rat": (["stage=sft", "stage.learning_rat=1"], {}),
    "carries a secret": (["stage=sft", "tracking.name=hf_ABCDefghijklmnopqrstuvwx"], {}),
    "call train\\(\\) once with each": (["stage=sft", "seed=1,2"], {}),
    "is no list of texts": ("stage=sft", {}),
    "folder= and config_dir=; leave it out": (["stage=sft", "hydra.sweep.dir=x"], {}),
    "hydra.run.dir has no use": (["stage=sft", "hydra.run.dir=x"], {"folder": "y"}),
    "config_dir=nowhere is no folder": (["stage=sft"], {"config_dir": "nowhere"}),
    "is not of the form key=value": (["--multirun", "stage=sft"], {}),
    "submits the jobs of a sweep": (["stage=sft", "hardware=slurm_4xa100"], {}),
    "models/none": (["stage=sft", "model=llama2_7b", "model.path=models/none"], {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_command_line_refuses_is_a_config_error_and_leaves_no_folder(message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = state_of_caller()
    overrides, given = REFUSED[message]
    with pytest.raises(Exception, match=message) as caught:
        train(overrides, **given)
    assert isinstance(caught.value, ConfigError) or "models/none" in message
    assert state_of_caller() == before
    assert list(tmp_path.iterdir()) == []


def test_one_of_several_workers_does_not_start_workers(desk, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(ConfigError, match=r"python -m cqlora\.run` with them"):
        train(desk)


def test_an_interrupt_reaches_the_run_and_comes_back_as_preempted(desk, tmp_path, monkeypatch):
    def interrupt(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("cqlora.launch.processes.wait_for_all", interrupt)
    with pytest.raises(Preempted):
        train(desk, folder="stopped")
    assert not (tmp_path / "stopped" / "adapter").exists()


def test_importing_it_loads_nothing_heavy():
    code = "import cqlora.run, sys; print(sorted({'torch', 'transformers', 'hydra', 'wandb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
