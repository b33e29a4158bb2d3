"""Launching as a user does: two at once, killed, by torchrun, by srun's variables; each in one folder of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cqlora.errors import ConfigError
from cqlora.launch.run_folder import hold_run_folder
from cqlora.launch.start import launch
from tests.conftest import HANG_SECONDS, ROOT, run_python, run_verb
from tests.launch.test_processes import assert_gone
from tests.runs import SMALL, events, losses, typed_run

RUN = [
    *SMALL,
    "stage=pretrain",
    "hardware=2xcpu",
    "stage.max_steps=6",
    "stage.checkpoint_every_steps=2",
    "data.sources.sample_zh.sample=41",
    "data.sources.sample_en.sample=41",
]
SELF = [sys.executable, "-m", "cqlora.run"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cqlora.run"]


def start(folder: Path, command: list[str], *overrides: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command in a folder, which keeps its cache and model."""
    return subprocess.Popen(
        [*command, *RUN, *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], expect: int = 0) -> str:
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == expect, output
    return output


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


BOTH = """
import subprocess, sys
both = [subprocess.Popen([sys.executable, "-m", "cqlora.run", *sys.argv[1:]]) for _ in range(2)]
sys.exit(max(each.wait() for each in both))
"""


def test_two_launches_at_once_share_a_cache_and_end_each_in_a_folder_of_its_own(tmp_path):
    run_python(tmp_path, "-c", BOTH, *RUN)
    folders = list((tmp_path / "outputs" / "pretrain").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert [step for step, _ in losses(folder)] == [1, 2, 3, 4, 5, 6]
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert losses(folders[0]) == losses(folders[1])
    assert len([each for each in (tmp_path / "cache").iterdir() if each.is_dir()]) == 1


def test_killed_a_run_leaves_no_worker_and_goes_on_under_torchrun_in_rank_0s_folder(tmp_path):
    run = tmp_path / "run0"
    long = ("stage.max_steps=1000000", "stage.schedule=constant")
    command = start(tmp_path, SELF, f"hydra.run.dir={run}", *long)
    while not [step for step, _ in losses(run) if step >= 3]:
        assert command.poll() is None, command.communicate()
        time.sleep(0.02)
    workers = children(command.pid)
    assert len(workers) == 2
    command.send_signal(signal.SIGKILL)
    command.communicate()
    assert_gone(*workers)
    steps = losses(run)[-1][0] + 2
    # Each worker's own start names another folder; the first one's is the run's.
    output = start(tmp_path, TORCHRUN, "hydra.run.dir=run${oc.env:RANK}", *long, f"stage.max_steps={steps}")
    finish(output)
    assert events(run)[-1] == "checkpoint" and "resumed" in events(run)
    assert [step for step, _ in losses(run)] == list(range(1, steps + 1))
    assert not (tmp_path / "run1").exists()


def test_a_folder_is_one_launchs_at_a_time(tmp_path):
    """flock is between open files, so one process can stand for two."""
    taken = tmp_path / "2026-01-01_00-00-00"
    with hold_run_folder(taken, given=False) as first, hold_run_folder(taken, given=False) as second:
        assert (first, second) == (taken, tmp_path / "2026-01-01_00-00-00-2")
        with pytest.raises(ConfigError, match="another run is going on in"), hold_run_folder(taken, given=True):
            pass
    with hold_run_folder(taken, given=True) as again:
        assert again == taken


def test_several_nodes_are_started_on_each_and_not_from_one(workspace, monkeypatch, tmp_path):
    config = typed_run(workspace, "stage=pretrain", "hardware.nodes=2", "hardware.strategy=ddp")
    with pytest.raises(ConfigError, match=r"has 2 nodes.*on every node with srun or torchrun"):
        launch(config, tmp_path, own_process=False)


def test_workers_of_torchrun_take_one_run_and_no_sweep(workspace, monkeypatch, tmp_path):
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"start every job with a torchrun or srun of its own"):
        launch(typed_run(workspace, "stage=pretrain", "hardware=2xcpu"), tmp_path, own_process=True)


def test_a_sweep_skips_what_does_not_fit_runs_the_rest_and_lists_it(workspace):
    memory = "hardware.host_memory_gib=16,0.01"
    paths = (f"model.path={workspace}/models/tiny", f"data.cache_dir={workspace}/cache")
    arguments = [*SMALL, *paths, "stage=pretrain", "stage.max_steps=1", "--multirun", memory, "hydra.sweep.dir=sweep"]
    output = run_verb(workspace, "run", *arguments).stderr
    assert re.search(
        r"^skipped: job 1 \(.*memory_gib=0\.01.*\): the run needs .* has 0\.0; .*allow_misfit=true", output, re.M
    )
    assert (workspace / "sweep" / "0" / "adapter").is_dir()
    assert not (workspace / "sweep" / "1" / "run.yaml").exists()
    none_fits = [each.replace("16,", "0.02,").replace("sweep.dir=sweep", "sweep.dir=none") for each in arguments]
    run_verb(workspace, "run", *none_fits, expect=3)
