"""`python -m cqlora.run`: compose → typed → checked → launched; torch is imported by nobody here."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cqlora.cli import run_program, stop, stop_early
from cqlora.errors import ConfigError, Preempted
from cqlora.signals import Stopped, stop_on_signals

if TYPE_CHECKING:
    from cqlora.config import RunConfig

_NAME_CHARACTERS = 128
"""W&B takes no longer name."""


def run(config: "RunConfig") -> float | None:
    """Train one run in the folder that Hydra chose; return the held-out loss, for sweepers that optimise it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from cqlora.launch import launch
    from cqlora.slurm import is_submitted, leave_job

    hydra = HydraConfig.get()
    swept = hydra.mode == RunMode.MULTIRUN
    refuse_unsubmitted(config.hardware.name, str(hydra.launcher._target_), swept)
    for note in config.notes():
        print(f"note: {note}", file=sys.stderr)
    given = any(override.lstrip("+").startswith(("hydra.run.", "hydra.sweep.")) for override in hydra.overrides.hydra)
    submitted = is_submitted()
    if swept or "WANDB_SWEEP_ID" in os.environ:
        config.tracking.name = config.tracking.name or name_job(config, Path(hydra.runtime.output_dir))
    try:
        # A submitted job is in a process of its own already.
        own_process = swept and not submitted
        return launch(config, Path(hydra.runtime.output_dir), own_process, folder_given=given or submitted)
    except Preempted as error:
        if submitted:
            leave_job()
        if swept:
            done = str(error).partition(";")[0]
            raise Preempted(
                f"{done}; the same command with hydra.sweep.dir={hydra.sweep.dir} goes on with this job and those that "
                "are left."
            ) from None
        raise


def name_job(config: "RunConfig", folder: Path) -> str:
    """A name for a tracker that tells a sweep's jobs apart: `pretrain-tiny-3 lora.rank=8,seed=2`.

    It has the overrides that have several values in this command; where the values come from elsewhere, as in a
    process that a launcher or W&B's agent has started, all of the job's own.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    hydra = HydraConfig.get()
    typed = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(typed)
    varied = {override.key_or_group for override in parsed if override.is_sweep_override()}
    varied |= set(hydra.sweeper.get("params") or {})
    own = [each.lstrip("+") for each in hydra.overrides.task]
    differing = [each for each in own if each.partition("=")[0] in varied] or own
    return f"{config.stage.name}-{config.model.name}-{folder.name} {','.join(differing)}"[:_NAME_CHARACTERS]


def refuse_unsubmitted(hardware: str, launcher: str, swept: bool) -> None:
    """Raise ConfigError for a single run with a launcher that Hydra uses in sweeps alone."""
    if "submitit" in launcher and not swept:
        raise ConfigError(
            f"hardware={hardware} submits the jobs of a sweep and this is a single run, which would start here; add "
            "--multirun, or use scripts/slurm/run.sbatch."
        )


def main() -> None:
    """The verb `run`, which signals end from here on."""
    try:
        with stop_on_signals():
            from cqlora.config import RunConfig

            run_program("config", RunConfig, run, help_overrides=("stage=pretrain",))
    except Stopped as stopped:
        stop(stop_early(stopped))


if __name__ == "__main__":
    main()
