"""Start a checked run: in this process, in one of its own, or in one worker per GPU under torchrun's agent."""

import os
import subprocess
import sys
from pathlib import Path

from cqlora.config import RunConfig
from cqlora.errors import Preempted, TrainingError
from cqlora.frozen import freeze_config
from cqlora.metrics import read_metrics
from cqlora.preflight import check_run
from cqlora.signals import hear_signals


def launch(config: RunConfig, output_dir: Path, own_process: bool) -> float | None:
    """Run one job in `output_dir`; return the mean held-out loss at its end (None without held-out text).

    `own_process` gives the job a fresh interpreter, which a sweep needs: no state of torch, of a tracker or
    of the memory allocator passes from one job to the next.
    """
    check_run(config)
    run_file = freeze_config(config, output_dir)
    if "LOCAL_RANK" in os.environ or (config.hardware.world_size == 1 and not own_process):
        from cqlora.progress import show_log
        from cqlora.train import train

        show_log()
        train(config, output_dir)
    else:
        supervise(worker_command(config, run_file), output_dir)
    return read_final_loss(output_dir)


def worker_command(config: RunConfig, run_file: Path) -> list[str]:
    """The command that trains from a frozen configuration: plain Python for one worker, torchrun for several."""
    train = ["-m", "cqlora.train", str(run_file)]
    if config.hardware.world_size == 1:
        return [sys.executable, *train]
    workers = f"--nproc-per-node={config.hardware.processes_per_node}"
    # --standalone lets the agent bind port 0, so two launches at once never meet.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", workers, *train]


def supervise(command: list[str], output_dir: Path) -> None:
    """Run a worker command to its end in a process group of its own, passing signals on.

    Raises:
        TrainingError: the worker failed; its own error is already on the terminal.
        Preempted: a signal stopped the run after a commit.
    """
    worker = subprocess.Popen(command, start_new_session=True)
    with hear_signals(lambda number: os.killpg(worker.pid, number)):
        code = worker.wait()
    if was_preempted(output_dir) and code != 0:
        raise Preempted(f"stopped by a signal; the same command with hydra.run.dir={output_dir} goes on.")
    if code != 0:
        raise TrainingError(f"the run in {output_dir} ended with exit code {code}; its error stands above.")


def was_preempted(output_dir: Path) -> bool:
    """Whether the last thing that the run recorded is that it committed and left on a signal."""
    rows = read_metrics(output_dir)
    return bool(rows) and rows[-1].get("event") == "preempted"


def read_final_loss(output_dir: Path) -> float | None:
    """Mean over sources of the last held-out losses."""
    evaluations = [row for row in read_metrics(output_dir) if row["kind"] == "eval"]
    if not evaluations:
        return None
    last = [row["loss"] for row in evaluations if row["step"] == evaluations[-1]["step"]]
    return float(sum(last) / len(last))
