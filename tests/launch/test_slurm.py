"""Jobs of a sweep elsewhere: submitit's local executor, and which job is queued again. tests/slurm has a real Slurm."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import submitit
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

from cqlora.config.schema import CONFIG_DIR, register_schemas
from cqlora.launch import slurm
from cqlora.system.metrics import read_metrics
from tests.conftest import ROOT, run_verb

RUN = (
    "stage=pretrain", "hardware=cpu", "tracking=none", "stage.max_steps=1", "stage.eval_tokens=300",
    "hydra/launcher=submitit_local",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sweeps run."""
    return tmp_path_factory.mktemp("sweeps")


def sweep(folder: Path, *overrides: str, expect: int = 0) -> str:
    """What a sweep says whose jobs submitit runs on this machine."""
    return run_verb(folder, "run", *RUN, *overrides, "--multirun", expect=expect).stderr


def test_submitit_runs_each_point_in_a_folder_of_its_own(folder: Path) -> None:
    sweep(folder, "seed=1,2", "hydra.sweep.dir=points")
    for job in ("0", "1"):
        assert (folder / "points" / job / "adapter" / "adapter_model.safetensors").is_file()
    losses = [[row["loss"] for row in read_metrics(folder / "points" / job) if row["kind"] == "train"] for job in "01"]
    assert losses[0] != losses[1]


def test_a_submitted_jobs_error_ends_the_sweep_in_one_sentence(folder: Path) -> None:
    told = sweep(folder, "stage.init_adapter=nowhere", "seed=1,2", "hydra.sweep.dir=errors", expect=1)
    assert told.splitlines()[-1].startswith("error: ")
    assert "nowhere" in told.splitlines()[-1]


def test_a_single_run_is_not_started_on_the_login_node(folder: Path) -> None:
    told = run_verb(folder, "run", "stage=pretrain", "hardware=slurm_2xcpu", expect=2).stderr
    assert told.count("\n") == 1
    assert "hardware=slurm_2xcpu submits the jobs of a sweep" in told


@pytest.mark.parametrize("sweeper", [[], ["hydra/sweeper=optuna", "sweep.trials=2"]])
def test_without_slurm_a_sweep_of_its_jobs_ends_in_one_sentence(sweeper, folder: Path) -> None:
    arguments = ["stage=pretrain", "hardware=slurm_4xa100", "lora.rank=4,8", "hydra.sweep.dir=no-slurm", *sweeper]
    told = run_verb(folder, "run", *arguments, "--multirun", expect=2, PATH="/nowhere").stderr
    assert told.splitlines()[-1].startswith("error: hardware=slurm_4xa100 submits the sweep's jobs to Slurm, and this")
    assert "use hardware=4xa100 where" in told and "Traceback" not in told


def test_an_arrays_job_is_named_by_array_and_index() -> None:
    assert slurm.own_job({"SLURM_JOB_ID": "7"}) == "7"
    array = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert slurm.own_job(array) == "7_3"


@pytest.mark.parametrize(
    "state, rank, requeued", [("RUNNING", "0", True), ("RUNNING", "1", False), ("COMPLETING", "0", False)]
)
def test_a_job_is_queued_again_by_its_first_task_unless_slurm_ends_it(
    state: str, rank: str, requeued: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def scontrol(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, f"JobId=7 JobName=cqlora JobState={state} Reason=None\n", "")

    monkeypatch.setattr(slurm.subprocess, "run", scontrol)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_PROCID", rank)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    with pytest.raises(SystemExit) as left:
        slurm.leave_job()
    assert left.value.code == 75
    assert (["scontrol", "requeue", "7"] in asked) == requeued


def write_submission(hardware: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file that a sweep's launcher would hand to sbatch."""
    (folder / "srun").write_text("#!/bin/sh\n")
    (folder / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    written: list[str] = []

    def take(self: submitit.AutoExecutor, *_: Any) -> list[Any]:
        written.append(self._executor._make_submission_file_text("worker", "job"))
        return []

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", take)
    with initialize_config_dir(version_base=None, config_dir=str(CONFIG_DIR)):
        register_schemas()
        overrides = ["stage=pretrain", f"hardware={hardware}", f"hydra.sweep.dir={folder}"]
        config = compose("config", [*overrides, "hydra.runtime.output_dir=."], return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    HydraConfig.instance().set_config(config)
    launcher = instantiate(config.hydra.launcher)
    launcher.config = config
    launcher.launch([["seed=1"]], 0)
    return written[0]


@pytest.mark.parametrize(
    "hardware",
    [file.stem for file in sorted(Path(CONFIG_DIR, "hardware").glob("slurm_*.yaml")) if file.stem != "slurm_2xcpu"],
)
def test_a_job_asks_for_the_cores_the_memory_and_the_warning_that_its_workers_need(hardware, tmp_path, monkeypatch):
    text = write_submission(hardware, tmp_path, monkeypatch)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.M))
    nodes, gpus = parse_hardware(hardware)
    assert (asked["nodes"], asked["gpus-per-node"]) == (str(nodes), str(gpus))
    assert int(asked["cpus-per-gpu"]) >= 8 and asked["mem-per-gpu"] == "64G"
    # One program starts the workers of a node; over several nodes srun starts each.
    assert asked.get("ntasks-per-node", "1") == str(gpus if nodes > 1 else 1)
    assert asked["signal"].endswith("@600") and "#SBATCH --requeue\n" in text
    assert text.index("export SLURM_KILL_BAD_EXIT=1\n") < text.index("\nsrun ")


def parse_hardware(name: str) -> tuple[int, int]:
    """Nodes and GPUs of each, by the name."""
    *nodes, gpus = re.findall(r"(\d+)x", name)
    return int(nodes[0]) if nodes else 1, int(gpus)


def test_the_script_of_one_run_asks_for_the_same():
    text = (ROOT / "scripts" / "slurm" / "run.sbatch").read_text()
    for line in ("--cpus-per-gpu=8", "--mem-per-gpu=64G", "--signal=TERM@600", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert "\nsrun --kill-on-bad-exit=1 python -m cqlora.run " in text
