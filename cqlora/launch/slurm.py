"""A job of a sweep that Slurm runs: stopped by a signal, it is queued again unless Slurm does so or ends it."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from shutil import which
from typing import NoReturn

from cqlora.errors import ConfigError, Preempted


def is_submitted() -> bool:
    """Whether hydra-submitit-launcher submitted this process to Slurm."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and "SLURM_JOB_ID" in os.environ


def require_slurm(hardware: str) -> None:
    """Raise ConfigError on a machine from which nothing can be submitted."""
    if which("srun") is None:
        raise ConfigError(
            f"hardware={hardware} submits the sweep's jobs to Slurm, and this machine has no srun; type it on one of "
            f"the cluster, or use hardware={hardware.removeprefix('slurm_')} where the GPUs are this machine's."
        )


def leave_job() -> NoReturn:
    """End this process after a commit, so that the job, started again, goes on where it was.

    A job that Slurm itself ends (preempted, requeued or cancelled) is left to it. One that still counts as running
    was warned of its time limit: it is queued again. The process leaves no result, since the job is not over.
    """
    job = own_job(os.environ)
    if os.environ.get("SLURM_PROCID", "0") == "0" and job_state(job) == "RUNNING":
        subprocess.run(["scontrol", "requeue", job], check=True)
    sys.exit(Preempted.exit_code)


def own_job(environment: Mapping[str, str]) -> str:
    """How Slurm's commands name this job: one of an array by array and index.

    The bare number of an array's last job stands for the whole array.
    """
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def job_state(job: str) -> str:
    """Slurm's word for the state of a job, such as RUNNING or COMPLETING."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, check=True)
    state = re.search(r"\bJobState=(\w+)", shown.stdout)
    return state[1] if state else ""
