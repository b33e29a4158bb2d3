"""`python -m cqlora.run`, and `train` for Python: compose → typed → checked → launched; nobody here imports torch."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cqlora.cli import quote_words, run_program, stop, stop_early
from cqlora.errors import ConfigError, Preempted
from cqlora.system.refusals import described_as_sentence
from cqlora.system.signals import Stopped, stop_on_signals

if TYPE_CHECKING:
    from cqlora.config.schema import RunConfig

_NAME_CHARACTERS = 128
"""W&B takes no longer name."""


def run(config: "RunConfig") -> float | None:
    """Train one run in the folder that Hydra chose; return the held-out loss, for sweepers that optimise it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from cqlora.launch.slurm import is_submitted, leave_job
    from cqlora.launch.start import launch, read_final_loss
    from cqlora.launch.sweeps import prunable

    hydra = HydraConfig.get()
    swept = hydra.mode == RunMode.MULTIRUN
    refuse_unsubmitted(config.hardware.name, str(hydra.launcher._target_), swept)
    config.sweep.require_search("Search" in str(hydra.sweeper._target_) and swept)
    tell_notes(config)
    given = any(override.lstrip("+").startswith(("hydra.run.", "hydra.sweep.")) for override in hydra.overrides.hydra)
    submitted = is_submitted()
    if swept or "WANDB_SWEEP_ID" in os.environ:
        config.tracking.name = config.tracking.name or name_job(config, Path(hydra.runtime.output_dir))
    try:
        # A submitted job is in a process of its own already.
        own_process = swept and not submitted
        with prunable(Path(hydra.runtime.output_dir), config.sweep):
            run_folder = launch(config, Path(hydra.runtime.output_dir), own_process, given or submitted)
        return read_final_loss(run_folder)
    except Preempted as error:
        if submitted:
            leave_job()
        if swept:
            done = str(error).partition(";")[0]
            raise Preempted(
                f"{done}; cqlora run sweep.resume={hydra.sweep.dir} goes on with this job and those that are left."
            ) from None
        raise


def train(overrides: Sequence[str], folder: str | Path | None = None, config_dir: str | Path | None = None) -> Path:
    """Train one run as `cqlora run OVERRIDES` does, from a script or a notebook; return its folder.

        train(["stage=sft", "model=tiny"], folder="outputs/first")

    It trains in processes of its own, so that nothing of torch's, of Hydra's or of the random generators here
    changes, and returns when they have ended. `folder` stands for hydra.run.dir: outputs/<stage>/<time> when it is
    None; one that holds a run goes on. `config_dir` has configuration files of yours, as --config-dir does.

    Raises:
        CqloraError: the run is refused, or its own error; Preempted when a signal, such as a notebook's interrupt,
            stopped it after a commit.
    """
    from omegaconf import open_dict

    from cqlora.config.composition import compose_alone
    from cqlora.config.diagnosis import to_schema
    from cqlora.config.schema import RunConfig
    from cqlora.launch.start import launch

    arguments, given = arrange_overrides(overrides, folder, config_dir)
    with described_as_sentence():
        with compose_alone("config", RunConfig, arguments) as composed:
            default_folder, launcher = str(composed.hydra.run.dir), str(composed.hydra.launcher._target_)
            with open_dict(composed):
                del composed["hydra"]
            config: RunConfig = to_schema(composed, RunConfig)
        refuse_unsubmitted(config.hardware.name, launcher, swept=False)
        tell_notes(config)
        return launch(config, Path(folder or default_folder).expanduser().absolute(), True, run_folder_given=given)


def arrange_overrides(
    overrides: Sequence[str], folder: str | Path | None, config_dir: str | Path | None
) -> tuple[list[str], bool]:
    """Overrides as Hydra reads them, and whether the run's folder is the user's choice.

    Raises:
        ConfigError: what `train` does not take, or a process that is one of several workers.
    """
    from cqlora.launch.cluster import find_rank_environment

    if find_rank_environment(os.environ) is not None:
        raise ConfigError(
            "train() starts its workers itself, and torchrun or srun has started several of this program; start "
            "`python -m cqlora.run` with them instead."
        )
    if isinstance(overrides, str) or not all(isinstance(each, str) for each in overrides):
        raise ConfigError('overrides is no list of texts; give one, such as ["stage=sft", "model=tiny"].')
    arguments = [quote_words(each) for each in overrides]
    of_hydra = [each.partition("=")[0].lstrip("+~") for each in arguments]
    of_hydra = [key for key in of_hydra if key.startswith(("hydra.", "hydra/"))]
    for key in of_hydra:
        if key != "hydra.run.dir" or folder is not None:
            raise ConfigError(f"{key} has no use in train(), which takes folder= and config_dir=; leave it out.")
    if config_dir is not None:
        files = Path(config_dir).expanduser().absolute()
        if not files.is_dir():
            raise ConfigError(f"config_dir={config_dir} is no folder; give the one with your configuration files.")
        arguments.append(f"hydra.searchpath=['file://{files}']")
    return arguments, folder is not None or bool(of_hydra)


def tell_notes(config: "RunConfig") -> None:
    """Say what a configuration's choices mean that may not be meant."""
    for note in config.notes():
        print(f"note: {note}", file=sys.stderr)


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


def arrange_sweep() -> None:
    """Put onto the command line what `sweep.resume=FOLDER` stands for, and where a run of W&B's agent belongs."""
    from cqlora.launch.sweeps import AGENT_SWEEP, claim_agent_folder, expand_resume

    try:
        sys.argv[1:] = expand_resume(sys.argv[1:])
    except ConfigError as error:
        stop(error)
    words = {argument.partition("=")[0] for argument in sys.argv[1:]}
    if AGENT_SWEEP in os.environ and not words & {"hydra.run.dir", "--multirun", "-m", "--help", "--cfg", "-c"}:
        sys.argv[1:1] = [f"hydra.run.dir={claim_agent_folder(os.environ[AGENT_SWEEP])}"]


def main() -> None:
    """The verb `run`, which signals end from here on."""
    try:
        with stop_on_signals():
            from cqlora.config.schema import RunConfig
            from cqlora.launch.sweeps import record_job

            arrange_sweep()
            run_program("config", RunConfig, run, around=record_job)
    except Stopped as stopped:
        stop(stop_early(stopped))


if __name__ == "__main__":
    main()
