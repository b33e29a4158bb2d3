"""`python -m cqlora.run`: compose → typed → checked → launched; torch is imported by nobody here."""

from pathlib import Path

from cqlora.cli import run_program
from cqlora.config import RunConfig


def run(config: RunConfig) -> float | None:
    """Train one run in the folder that Hydra chose; return the held-out loss, for sweepers that optimise it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from cqlora.launch import launch

    hydra = HydraConfig.get()
    swept = hydra.mode == RunMode.MULTIRUN
    given = any(override.lstrip("+").startswith(("hydra.run.", "hydra.sweep.")) for override in hydra.overrides.hydra)
    return launch(config, Path(hydra.runtime.output_dir), own_process=swept, folder_given=given)


def main() -> None:
    """The verb `run`."""
    run_program("config", RunConfig, run, help_overrides=("stage=pretrain",))


if __name__ == "__main__":
    main()
