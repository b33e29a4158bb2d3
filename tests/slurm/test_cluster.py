"""On a real Slurm of one node: a sweep, a job that is preempted, one that runs out of time, a batch script.

`make test-slurm` runs it, as root, where Debian's slurm-wlm and munge are installed.
"""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cqlora.system.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent
CLUSTER = Path(__file__).parent / "cluster.sh"
RUN = (
    "stage=pretrain", "tracking=none", "stage.max_steps=40", "stage.checkpoint_every_steps=15", "lora.dropout=0.1",
    "stage.eval_tokens=300",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    "CQLORA_TEST_SLURM" not in os.environ, reason="starts a Slurm of its own: run `make test-slurm`"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of this machine alone, for as long as the module's tests run."""
    folder = tmp_path_factory.mktemp("cluster")
    subprocess.run([CLUSTER, "start", folder], check=True)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield
    subprocess.run([CLUSTER, "stop", folder], check=True)
    del os.environ["SLURM_CONF"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models, caches and runs go."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(workspace: Path) -> Path:
    """Two runs that nothing stops, without Slurm."""
    folder = workspace / "undisturbed"
    command = [sys.executable, "-m", "cqlora.run", *RUN, "hardware=2xcpu", "seed=1,2", f"hydra.sweep.dir={folder}"]
    subprocess.run([*command, "--multirun"], check=True, cwd=workspace)
    return folder


def test_a_preempted_job_and_one_out_of_time_end_as_if_undisturbed(
    cluster: None, workspace: Path, undisturbed: Path
) -> None:
    folder = workspace / "sweep"
    command = [sys.executable, "-m", "cqlora.run", *RUN, "hardware=slurm_2xcpu", "seed=1,2", "--multirun"]
    sweep = subprocess.Popen([*command, f"hydra.sweep.dir={folder}", "hydra.launcher.timeout_min=30"], cwd=workspace)
    disturb(folder / "0", lambda job: slurm("scontrol", "requeue", job))
    disturb(folder / "1", lambda job: slurm("scancel", "--signal=USR2", job))
    until(lambda: sweep.poll() is not None or hurry())
    assert sweep.returncode == 0
    for job in ("0", "1"):
        happened = [row["event"] for row in read_metrics(folder / job) if row["kind"] == "event"]
        assert happened.count("preempted") == happened.count("resumed") == 1, happened
        assert losses(folder / job) == losses(undisturbed / job)
        assert adapter_sha256(folder / job) == adapter_sha256(undisturbed / job)


def test_the_batch_script_starts_a_worker_for_each_task(cluster: None, workspace: Path, undisturbed: Path) -> None:
    script = ROOT / "scripts" / "slurm" / "run.sbatch"
    options = ["--parsable", "--wait", "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--time=10"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sbatch", *options, script, *RUN, "hardware=2xcpu", "seed=1"],
        cwd=workspace, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    job = done.stdout.strip()
    assert done.returncode == 0, (workspace / f"slurm-{job}.out").read_text()
    assert adapter_sha256(workspace / f"outputs/slurm-{job}") == adapter_sha256(undisturbed / "0")


def disturb(folder: Path, how: Callable[[str], str]) -> None:
    """Do something to the job that runs in `folder`, as soon as it has trained some steps."""
    until(lambda: (folder / "metrics.jsonl").is_file() and len(losses(folder)) >= 5)
    # By array and index: the bare number of an array's last job stands for the whole array.
    running = slurm("squeue", "--noheader", "--states=RUNNING", "--format=%F_%K").split()
    (job,) = [job for job in running if job.endswith(f"_{folder.name}")]
    how(job)


def hurry() -> bool:
    """Let jobs that were queued again start now, not two minutes later; False, so that waiting goes on."""
    for line in slurm("squeue", "--noheader", "--states=PENDING", "--format=%F_%K %r").splitlines():
        job, reason = line.split(maxsplit=1)
        if reason == "BeginTime":
            subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=False, capture_output=True)
            time.sleep(2)
    return False


def until(holds: Callable[[], bool], seconds: float = 200) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, slurm("squeue")
        time.sleep(0.2)


def slurm(*command: str) -> str:
    """What one of Slurm's commands prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def losses(folder: Path) -> list[float]:
    """Loss of every training step."""
    return [row["loss"] for row in read_metrics(folder) if row["kind"] == "train"]


def adapter_sha256(folder: Path) -> str:
    """Hash of the final adapter's weights."""
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
