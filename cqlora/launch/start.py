"""Start a checked run: in this process, in worker processes of its own, or as one of the workers of a cluster."""

import logging
import os
from pathlib import Path

from cqlora.config.run_yaml import stage_config
from cqlora.config.schema import RunConfig
from cqlora.errors import ConfigError
from cqlora.launch.cluster import find_place, take_place
from cqlora.launch.preflight import check_run
from cqlora.launch.processes import run_workers
from cqlora.launch.run_folder import hold_folder
from cqlora.launch.settle import look_around, settle
from cqlora.system.metrics import mean_loss, read_metrics

logger = logging.getLogger(__name__)


def launch(config: RunConfig, output_dir: Path, own_process: bool, folder_given: bool = True) -> Path:
    """Settle and check one job, and run it in `output_dir`; return the folder that it was run in.

    `own_process` gives a job of one worker a fresh interpreter, which a sweep needs: no state of torch, of a
    tracker or of the memory allocator passes from one job to the next. Where the folder was not `folder_given`
    by the user, another is taken if a run is going on in it.

    Raises:
        CqloraError: the run cannot start, or its own error.
    """
    place = find_place(os.environ)
    if place is not None and own_process:
        raise ConfigError(
            "workers that torchrun or srun started train one run and --multirun has several; start every job with a "
            "torchrun or srun of its own."
        )
    given = look_around(config, output_dir)
    config = settle(config, given)
    check_run(config, given)
    if place is not None:
        take_place(place, config.hardware)
    elif config.hardware.nodes > 1:
        raise ConfigError(
            f"hardware={config.hardware.name} has {config.hardware.nodes} nodes, and this process can start workers "
            "on one; start the same command on every node with srun or torchrun."
        )
    if place is not None and place["RANK"] != "0":
        # The first worker names the folder and holds it.
        return train_here(config, output_dir)
    with hold_folder(output_dir, folder_given) as folder:
        if place is None and (own_process or config.hardware.world_size > 1):
            run_workers(stage_config(config, folder), config.hardware)
            return folder
        return train_here(config, folder)


def train_here(config: RunConfig, output_dir: Path) -> Path:
    """Train in this process; return the folder that the workers agreed on."""
    from cqlora.system.progress import show_log

    show_log()
    logger.info("run %s: importing torch", output_dir)
    from cqlora.train.run import train

    return train(config, output_dir)


def read_final_loss(output_dir: Path) -> float | None:
    """Mean over all tokens of the last held-out losses; None without held-out text."""
    evaluations = [row for row in read_metrics(output_dir) if row["kind"] == "eval"]
    return mean_loss([row for row in evaluations if row["step"] == evaluations[-1]["step"]])
