"""Start a checked run: in this process, in worker processes of its own, or as one of the workers of a cluster."""

import logging
import os
from pathlib import Path

from cqlora.config.run_yaml import stage_config
from cqlora.config.schema import RunConfig
from cqlora.errors import ConfigError
from cqlora.launch.cluster import find_rank_environment, take_rank_environment
from cqlora.launch.objectives import check_evaluated, measure_objectives
from cqlora.launch.preflight import check_run
from cqlora.launch.processes import run_workers
from cqlora.launch.run_folder import hold_run_folder
from cqlora.launch.settle import look_around, settle
from cqlora.report.page import conclude
from cqlora.system.metrics import mean_loss, read_metrics

logger = logging.getLogger(__name__)


def launch(config: RunConfig, run_folder: Path, own_process: bool, run_folder_given: bool = True) -> Path:
    """Settle and check one job, and run it in `run_folder`; return the folder that it was run in.

    `own_process` gives a job of one worker a fresh interpreter, which a sweep needs: no state of torch, of a
    tracker or of the memory allocator passes from one job to the next. Where it was not `run_folder_given`
    by the user, another is taken if a run is going on in it.

    Raises:
        CqloraError: the run cannot start, or its own error.
    """
    rank_environment = find_rank_environment(os.environ)
    if rank_environment is not None and own_process:
        raise ConfigError(
            "workers that torchrun or srun started train one run and --multirun has several; start every job with a "
            "torchrun or srun of its own."
        )
    check_evaluated(config.sweep)
    given = look_around(config, run_folder)
    config = settle(config, given)
    check_run(config, given)
    if rank_environment is not None:
        take_rank_environment(rank_environment, config.hardware)
    elif config.hardware.nodes > 1:
        raise ConfigError(
            f"hardware={config.hardware.name} has {config.hardware.nodes} nodes, and this process can start workers "
            "on one; start the same command on every node with srun or torchrun."
        )
    if rank_environment is not None and rank_environment["RANK"] != "0":
        # The first worker names the folder and holds it.
        return train_here(config, run_folder)
    with hold_run_folder(run_folder, run_folder_given) as run_folder:
        if rank_environment is None and (own_process or config.hardware.world_size > 1):
            run_workers(stage_config(config, run_folder), config.hardware)
        else:
            run_folder = train_here(config, run_folder)
        measure_objectives(config, run_folder)
    if not config.stage.find_learning_rate:
        conclude(run_folder)
    return run_folder


def train_here(config: RunConfig, run_folder: Path) -> Path:
    """Train in this process; return the folder that the workers agreed on."""
    from cqlora.system.progress import show_log

    show_log()
    logger.info("run %s: importing torch", run_folder)
    from cqlora.train.run import train

    return train(config, run_folder)


def read_final_loss(run_folder: Path) -> float | None:
    """Mean over all tokens of the last held-out losses; None without held-out text."""
    evaluations = [row for row in read_metrics(run_folder) if row["kind"] == "eval"]
    return mean_loss([row for row in evaluations if row["step"] == evaluations[-1]["step"]])
