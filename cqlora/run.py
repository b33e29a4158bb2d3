"""`python -m cqlora.run`: compose → typed → checked → launched; torch is imported by nobody here."""

import sys
from pathlib import Path

from cqlora.cli import run_program
from cqlora.config import RunConfig
from cqlora.errors import ConfigError, Preempted


def run(config: RunConfig) -> float | None:
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
    try:
        # A submitted job is in a process of its own already.
        own_process = swept and not submitted
        return launch(config, Path(hydra.runtime.output_dir), own_process, folder_given=given or submitted)
    except Preempted:
        if submitted:
            leave_job()
        raise


def refuse_unsubmitted(hardware: str, launcher: str, swept: bool) -> None:
    """Raise ConfigError for a single run with a launcher that Hydra uses in sweeps alone."""
    if "submitit" in launcher and not swept:
        raise ConfigError(
            f"hardware={hardware} submits the jobs of a sweep and this is a single run, which would start here; add "
            "--multirun, or use scripts/slurm/run.sbatch."
        )


def main() -> None:
    """The verb `run`."""
    run_program("config", RunConfig, run, help_overrides=("stage=pretrain",))


if __name__ == "__main__":
    main()
