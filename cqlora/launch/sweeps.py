"""What joins a sweep's files and Optuna's proposals to Hydra: jobs are composed, planned, launched and recorded."""

import itertools
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cqlora.config.diagnosis import to_schema
from cqlora.config.run_yaml import load_recorded
from cqlora.config.schema import RunConfig
from cqlora.config.sweeps import SweepConfig, check_measured
from cqlora.errors import ConfigError, CqloraError, DiskError, DoesNotFit, Preempted, Pruned
from cqlora.launch.objectives import check_evaluated
from cqlora.launch.preflight import check_memory
from cqlora.launch.run_folder import SWEEP_FILE
from cqlora.launch.settle import look_ahead, settle
from cqlora.launch.slurm import require_slurm
from cqlora.report.page import conclude
from cqlora.sweep.search import Proposal, Search, check_objectives, check_span, follow_trial, read_space
from cqlora.sweep.summary import render_summary
from cqlora.sweep.trials import State, read_trials, record_trial, refuse_trial
from cqlora.system.durable import lock_file, make_folder, replace_file
from cqlora.system.refusals import described_as_sentence
from cqlora.system.signals import Stopped

AGENT_SWEEP = "WANDB_SWEEP_ID"
"""What W&B's agent sets in the environment of the commands that it starts."""
_MAX_PLANNED = 64
"""Combinations that a search plans before its first trial; more are planned when they are proposed."""
_KEPT_OUT = ("hydra.mode", "hydra.sweep.dir", "sweep.resume")
_FREE_TO_CHANGE = ("hydra.launcher.", "hydra/launcher", "sweep.trials", "sweep.at_once")
"""What may be typed anew for a sweep that goes on."""


@dataclass(frozen=True)
class Sweep:
    """What Hydra hands to a sweeper: how jobs are composed and called, and the configuration of all of them."""

    context: Any
    task: Any
    config: DictConfig

    @cached_property
    def folder(self) -> Path:
        """The sweep's."""
        return Path(str(self.config.hydra.sweep.dir))

    @cached_property
    def settings(self) -> SweepConfig:
        """The keys under `sweep`.

        Raises:
            ConfigError: they contradict, or the jobs' folders are to be others than their numbers.
        """
        settings: Any = OmegaConf.to_object(self.config.sweep)
        assert isinstance(settings, SweepConfig)
        typed = [str(override) for override in self.config.hydra.overrides.hydra]
        if any(override.startswith("hydra.sweep.subdir=") for override in typed):
            raise ConfigError("hydra.sweep.subdir has no use here: the jobs' folders are their numbers; leave it out.")
        return settings

    @cached_property
    def launcher(self) -> Any:
        """What runs jobs here or elsewhere."""
        from hydra.core.plugins import Plugins

        return Plugins.instance().instantiate_launcher(self.context, self.task, self.config)

    @property
    def runs_here(self) -> bool:
        """Whether jobs run one after another on this machine."""
        return str(self.config.hydra.launcher._target_).startswith("hydra._internal")

    def begin(self) -> None:
        """Make the folder, with what the sweep is to be gone on with from.

        Raises:
            ConfigError: its jobs are Slurm's, and this machine knows none.
        """
        if str(self.config.hydra.launcher._target_).endswith("SlurmLauncher"):
            require_slurm(str(self.config.hydra.runtime.choices.hardware))
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / SWEEP_FILE, OmegaConf.to_yaml(self.config).encode())

    def compose(self, overrides: list[str]) -> DictConfig:
        """A job's configuration.

        Raises:
            ConfigError: it is none.
        """
        composed: DictConfig = self.context.config_loader.load_sweep_config(self.config, overrides)
        return composed

    def find_misfit(self, composed: DictConfig) -> DoesNotFit | None:
        """Why the plan says that a job's machine cannot hold it; None for a job that may start, or fail otherwise."""
        try:
            config = read_run(composed)
            given = look_ahead(config)
            check_memory(settle(config, given), given)
        except DoesNotFit as error:
            return error
        except CqloraError:
            # Told by the job itself, when its turn comes.
            return None
        return None

    def launch(self, jobs: list[tuple[int, list[str]]]) -> None:
        """Run jobs, each in the folder of its number; a folder that the disk refuses ends no other job here."""
        if not self.runs_here:
            self.launch_together(jobs)
            return
        for number, own in jobs:
            try:
                with described_as_sentence():
                    self.launch_together([(number, own)])
            except DiskError as error:
                refuse_trial(self.folder, number, to_values(own), str(error), State.failed)
                error.add_note(f"job {number} ({' '.join(own)})")
                self.task.outcomes.append(error)

    def launch_together(self, jobs: list[tuple[int, list[str]]]) -> None:
        """Hand jobs to the launcher, and keep the errors of those that ran elsewhere."""
        if not jobs:
            return
        # A job's own configuration may name another folder: after its stage, say.
        folder = f"hydra.sweep.dir='{self.folder}'"
        overrides = [[*own, folder, f"hydra.sweep.subdir={number}"] for number, own in jobs]
        for result in self.launcher.launch(overrides, initial_job_idx=jobs[0][0]):
            error = result._return_value
            if isinstance(error, BaseException) and not isinstance(error, Pruned):
                self.task.outcomes.append(error)
                if not isinstance(error, CqloraError):
                    raise error

    def refuse(self, number: int, overrides: list[str], error: DoesNotFit) -> None:
        """Record and tell a job that is not started."""
        refuse_trial(self.folder, number, to_values(overrides), str(error))
        error.add_note(f"job {number} ({' '.join(overrides)})")
        self.task.outcomes.append(error)

    @contextmanager
    def told_at_end(self) -> Iterator[None]:
        """Print the summary and write the page when the sweep ends, however it ends."""
        try:
            yield
        finally:
            if trials := read_trials(self.folder):
                print(f"\n{render_summary(trials, self.settings.goals)}\n\nsweep {self.folder}", flush=True)
                if any((self.folder / trial.folder).is_dir() for trial in trials):
                    conclude(self.folder)


def sweep_grid(sweep: Sweep, arguments: list[str]) -> None:
    """Run every combination of the values in `arguments` that has not run to its end yet.

    Raises:
        ConfigError: a job cannot be composed, or the folder holds another sweep.
    """
    sweep.settings.require_search(False)
    check_evaluated(sweep.settings)
    points = list(enumerate(combine(parse(sweep, arguments))))
    check_same_sweep(sweep.folder, points)
    composed = {number: compose_job(sweep, number, point) for number, point in points}
    with hold_sweep(sweep.folder):
        sweep.begin()
        run_grid(sweep, points, composed)


def run_grid(sweep: Sweep, points: list[tuple[int, list[str]]], composed: dict[int, DictConfig]) -> None:
    """Launch the jobs that have not run to their end and that fit, and tell the sweep's end."""
    ended = {trial.number for trial in read_trials(sweep.folder) if trial.state in (State.finished, State.pruned)}
    with sweep.told_at_end():
        fitting = []
        for number, point in points:
            if number in ended:
                continue
            # A single job tells by itself, as a run does.
            misfit = sweep.find_misfit(composed[number]) if len(points) > 1 else None
            if misfit is None:
                fitting.append((number, point))
            else:
                sweep.refuse(number, point, misfit)
        sweep.launch(fitting)


@contextmanager
def hold_sweep(folder: Path) -> Iterator[None]:
    """Be the one process that runs a grid in a folder; a search is shared, a grid's jobs are dealt out by one.

    Raises:
        ConfigError: another process runs it now.
    """
    make_folder(folder)
    file = folder / ".sweep.lock"
    descriptor = lock_file(file, wait=False)
    if descriptor is None:
        raise ConfigError(
            f"another process runs the sweep in {folder}; wait for it, or give another folder with "
            "hydra.sweep.dir=FOLDER."
        )
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def compose_job(sweep: Sweep, number: int, point: list[str]) -> DictConfig:
    """A job's configuration.

    Raises:
        ConfigError: it is none, or its run measures no such objective; the sentence names the job.
    """
    try:
        composed = sweep.compose(point)
        # Told by no job, since it would be told by all of them.
        check_measured(sweep.settings, composed.data, composed.stage)
        return composed
    except ConfigError as error:
        raise ConfigError(f"job {number} ({' '.join(point)}): {error}") from error


def sweep_search(sweep: Sweep, arguments: list[str]) -> None:
    """Run the trials that a search proposes, beside whatever other processes run of it.

    Raises:
        ConfigError: nothing is searched, the folder holds another search, or an objective is not measured.
        DoesNotFit: none of the values fits the machine.
    """
    if not is_installed("optuna"):
        raise ConfigError("hydra/sweeper=optuna needs its package; type `pip install 'cqlora[search]'`.")
    settings = sweep.settings
    if settings.at_once > 1 and sweep.runs_here:
        raise ConfigError(
            f"sweep.at_once={settings.at_once} has no effect where jobs run one after another; start the same command "
            "several times with one hydra.sweep.dir=FOLDER instead."
        )
    check_evaluated(settings)
    fixed, space = read_space(parse(sweep, arguments))
    search = Search(sweep.folder, settings, space)
    misfits = plan_space(sweep, fixed, space)
    sweep.begin()
    search.open()
    with sweep.told_at_end():
        try:
            while jobs := next_jobs(sweep, search, fixed, misfits):
                sweep.launch(jobs)
                for number, _ in jobs:
                    search.tell(number)
                check_objectives(read_trials(sweep.folder), settings.goals)
        finally:
            search.release_all()


def next_jobs(
    sweep: Sweep, search: Search, fixed: list[str], misfits: dict[tuple[str, ...], DoesNotFit | None]
) -> list[tuple[int, list[str]]]:
    """As many of the next trials as are launched at once; for each that does not fit another is proposed."""
    jobs: list[tuple[int, list[str]]] = []
    while len(jobs) < sweep.settings.at_once and (proposal := search.propose()) is not None:
        overrides = [*fixed, *proposal.overrides]
        error = misfit_of(sweep, fixed, proposal, search, misfits)
        if error is None:
            jobs.append((proposal.number, overrides))
        else:
            sweep.refuse(proposal.number, overrides, DoesNotFit(str(error)))
            search.refuse(proposal.number)
    return jobs


def plan_space(sweep: Sweep, fixed: list[str], space: dict[str, Any]) -> dict[tuple[str, ...], DoesNotFit | None]:
    """What of a search does not fit, before its first trial: each combination of its choices is planned.

    Raises:
        ConfigError: with the first of the values there is no run.
        DoesNotFit: all of them.
    """
    choices = {key: each.choices for key, each in space.items() if hasattr(each, "choices")}
    combinations = list(itertools.islice(itertools.product(*choices.values()), _MAX_PLANNED + 1))
    numbers = [f"{key}={each.low}" for key, each in space.items() if key not in choices]
    first = [f"{key}={value}" for key, value in zip(choices, combinations[0], strict=True)]
    read_run(sweep.compose([*fixed, *first, *numbers]))
    if len(combinations) > _MAX_PLANNED:
        return {}
    misfits = {}
    for combination in combinations:
        chosen = tuple(f"{key}={value}" for key, value in zip(choices, combination, strict=True))
        misfits[chosen] = error = sweep.find_misfit(sweep.compose([*fixed, *chosen, *numbers]))
        if error is not None:
            print(f"left out: {' '.join(chosen)}: {error}", flush=True)
    if all(misfits.values()):
        raise DoesNotFit(str(next(iter(misfits.values()))))
    return misfits


def misfit_of(
    sweep: Sweep,
    fixed: list[str],
    proposal: Proposal,
    search: Search,
    misfits: dict[tuple[str, ...], DoesNotFit | None],
) -> DoesNotFit | None:
    """Why a proposal is not started: its choices were left out, or its numbers make it too large."""
    choices = {key for key, each in search.space.items() if hasattr(each, "choices")}
    chosen = tuple(each for each in proposal.overrides if each.partition("=")[0] in choices)
    return misfits.get(chosen) or sweep.find_misfit(sweep.compose([*fixed, *proposal.overrides]))


def parse(sweep: Sweep, arguments: list[str]) -> list[Any]:
    """Overrides as Hydra reads them; the last of a key counts, as in files and then on the command line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create(config_loader=sweep.context.config_loader).parse_overrides(arguments)
    return list({override.get_key_element(): override for override in parsed}.values())


def combine(overrides: list[Any]) -> list[list[str]]:
    """Each job's overrides: the product of all values, the last key's varying fastest.

    Raises:
        ConfigError: a range without values of its own.
    """
    lists = []
    for override in overrides:
        key = override.get_key_element()
        check_span(override)
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(
                f"`{override.input_line}` is a range to search; add hydra/sweeper=optuna, or list values."
            )
        values = (
            override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
        )
        lists.append([f"{key}={value}" for value in values])
    return [list(point) for point in itertools.product(*lists)]


def check_same_sweep(folder: Path, points: list[tuple[int, list[str]]]) -> None:
    """Raise ConfigError where a folder's trials are not the first jobs of this sweep."""
    own = {number: to_values(point) for number, point in points}
    for trial in read_trials(folder):
        if own.get(trial.number) != trial.overrides:
            told = " ".join(f"{key}={value}" for key, value in trial.overrides.items())
            raise ConfigError(
                f"{folder} holds another sweep, whose job {trial.number} is {told}; give another folder with "
                "hydra.sweep.dir=FOLDER."
            )


def to_values(overrides: list[str]) -> dict[str, Any]:
    """Overrides as trials.jsonl has them: numbers, true, false and null as such, all else as text.

    Those below `sweep` say how runs are compared and nothing of the run.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    values = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        value = override.value()
        plain = value is None or type(value) in (bool, int, float)
        text = re.sub(r"^'(.*)'$|^\"(.*)\"$", r"\1\2", override.get_value_element_as_str())
        if not override.key_or_group.startswith("sweep."):
            values[override.key_or_group] = value if plain else text
    return values


def read_run(composed: DictConfig) -> RunConfig:
    """The typed configuration of a job that was composed with what is Hydra's own."""
    with open_dict(composed):
        del composed["hydra"]
    config: RunConfig = to_schema(composed, RunConfig)
    return config


def record_job() -> Any:
    """A context in which this job's fate is written down: a sweep's, or one that W&B's agent has started."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    swept = hydra.mode == RunMode.MULTIRUN
    if not (swept or AGENT_SWEEP in os.environ) or not folder.name.isdigit():
        return nullcontext()
    return _recorded(folder, to_values(list(hydra.overrides.task)))


@contextmanager
def _recorded(folder: Path, overrides: dict[str, Any]) -> Iterator[None]:
    try:
        with record_trial(folder.parent, folder, overrides):
            yield
    except Pruned as pruned:
        print(f"job {folder.name}: {pruned}", flush=True)


@contextmanager
def prunable(folder: Path, settings: SweepConfig) -> Iterator[None]:
    """A trial of a search, which its pruner may end.

    Raises:
        Pruned: it has, after a commit.
    """
    with follow_trial(folder, settings, lambda: os.kill(os.getpid(), signal.SIGTERM)) as follower:
        try:
            yield
        except (Preempted, Stopped):
            if follower is None or not follower.pruned:
                raise
            raise Pruned("its evaluation was worse than the median of earlier trials at that step.") from None


def expand_resume(arguments: list[str]) -> list[str]:
    """The command line that `sweep.resume=FOLDER` stands for: the sweep's own overrides, in its folder.

    Raises:
        ConfigError: no sweep's folder, or overrides beside it that are not the sweep's.
    """
    named = [argument.partition("=")[2] for argument in arguments if argument.startswith("sweep.resume=")]
    if not named or named[-1] in ("", "''"):
        return arguments
    folder = Path(named[-1].strip("'\"")).expanduser()
    file = folder / SWEEP_FILE
    if not file.is_file():
        raise ConfigError(f"sweep.resume={folder} has no {SWEEP_FILE}; give the folder of a sweep.")
    try:
        recorded = load_recorded(file).hydra.overrides
        own = [str(each) for each in [*recorded.task, *recorded.hydra]]
    except (ConfigError, OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is damaged; put it back, or start the sweep's command in a new folder.") from error
    own = [each for each in own if each.partition("=")[0] not in _KEPT_OUT]
    flags = [argument for argument in arguments if argument.startswith("-") and argument not in ("--multirun", "-m")]
    typed = [each for each in arguments if not each.startswith("-") and each.partition("=")[0] not in _KEPT_OUT]
    for override in typed:
        # Its value may be a secret, which is looked for only later.
        key = override.partition("=")[0]
        if override not in own and not key.startswith(_FREE_TO_CHANGE):
            raise ConfigError(f"sweep.resume={folder} goes on with the sweep's own overrides; leave out {key}=.")
    changed = {override.partition("=")[0] for override in typed}
    kept = [override for override in own if override.partition("=")[0] not in changed]
    return [*kept, *typed, f"hydra.sweep.dir='{folder}'", "--multirun", *flags]


def claim_agent_folder(sweep_id: str) -> Path:
    """A new folder for a run that W&B's agent has started, beside the others of its sweep."""
    sweep = Path("multirun", f"wandb-{re.sub(r'[^A-Za-z0-9_-]', '_', sweep_id)}")
    for number in itertools.count():
        try:
            (sweep / str(number)).mkdir(parents=True)
        except FileExistsError:
            continue
        return sweep / str(number)
    raise AssertionError


def is_installed(package: str) -> bool:
    """Whether a package of an extra is there."""
    from importlib.util import find_spec

    return find_spec(package) is not None
