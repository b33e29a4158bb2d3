"""A search by Optuna's ask and tell: which values to try next; its study is a SQLite file in the sweep's folder.

Any number of processes share it: who asks or tells holds the study, and whoever runs a trial claims it, until the
process ends. What a trial is proposed depends on the seed, on its number and on what was told before, and on nothing
that a killed process forgets.
"""

import hashlib
import json
import math
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from cqlora.config.choices import Goal, Pruner
from cqlora.config.sweeps import SweepConfig
from cqlora.errors import ConfigError, DiskError
from cqlora.sweep.trials import State, Trial, is_held, read_trials
from cqlora.system.durable import hold, lock_file, make_folder
from cqlora.system.metrics import evaluated_values

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STUDY_FILE = "search.db"
STUDY_NAME = "search"
_FOLLOW_SECONDS = 0.5
_LOCK_SECONDS = 120
"""How long SQLite waits for another process of the search."""
_REFUSED = "refused"
_MOST_VALUES = 1_000_000
"""Of a range; a typing error has more."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Values to try: a trial's number, and its own overrides."""

    number: int
    overrides: list[str]


def read_space(overrides: list[Override]) -> tuple[list[str], dict[str, "BaseDistribution"]]:
    """The overrides that are fixed, and the distributions of those that are searched, by key.

    Raises:
        ConfigError: nothing is searched, or a key that cannot be.
    """
    fixed, space = [], {}
    for override in overrides:
        if override.is_sweep_override():
            space[override.get_key_element()] = to_distribution(override)
        else:
            fixed.append(f"{override.get_key_element()}={override.get_value_element_as_str()}")
    if not space:
        raise ConfigError(
            "nothing is searched; give a key several values, such as lora.rank=4,8 or "
            "'stage.learning_rate=tag(log,interval(1e-5,1e-3))'."
        )
    return fixed, space


def to_distribution(override: Override) -> "BaseDistribution":
    """What Hydra's `choice`, `range` and `interval`, tagged `log` or not, are to Optuna.

    Raises:
        ConfigError: a sweep of another kind, or a logarithm of what is not above zero.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    key, sweep = override.get_key_element(), override.value()
    check_span(override)
    low: Any
    high: Any
    if key == "seed":
        raise ConfigError("seed is no value to search for; give one, and compare seeds without hydra/sweeper=optuna.")
    if isinstance(sweep, ChoiceSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    if not isinstance(sweep, RangeSweep | IntervalSweep):
        raise ConfigError(f"`{override.input_line}` cannot be searched; use choice(…), range(…) or interval(…).")
    low, high = (sweep.start, sweep.stop) if isinstance(sweep, RangeSweep) else (sweep.start, sweep.end)
    step = sweep.step if isinstance(sweep, RangeSweep) else None
    log, whole = "log" in sweep.tags, isinstance(low, int) and isinstance(high, int) and isinstance(step or 1, int)
    if low >= high or (log and low <= 0):
        raise ConfigError(f"`{override.input_line}` spans nothing{' that has a logarithm' * log}; give LOW,HIGH.")
    if isinstance(sweep, RangeSweep):
        # Hydra's range ends before its stop.
        values = list(override.sweep_iterator())
        high = values[-1]
    if log:
        return IntDistribution(int(low), int(high), log=True) if whole else FloatDistribution(low, high, log=True)
    if whole:
        return IntDistribution(int(low), int(high), step=int(step or 1))
    return FloatDistribution(low, high, step=step)


def check_span(override: Override) -> None:
    """Raise ConfigError for a range or interval of numbers that has no values, or never ends."""
    sweep = override.value()
    if not isinstance(sweep, RangeSweep | IntervalSweep):
        return
    low, high = sweep.start, sweep.stop if isinstance(sweep, RangeSweep) else sweep.end
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"`{override.input_line}` has no end; give LOW,HIGH as numbers.")
    if isinstance(sweep, RangeSweep) and not (sweep.step and 0 < (high - low) / sweep.step < _MOST_VALUES):
        raise ConfigError(
            f"`{override.input_line}` has no values, or too many; give LOW,HIGH,step=STEP with fewer than "
            f"{_MOST_VALUES:,}."
        )


@dataclass(slots=True)
class Search:
    """The study in a sweep's folder, as this process takes part in it."""

    folder: Path
    settings: SweepConfig
    space: dict[str, "BaseDistribution"]
    _claims: dict[int, int] = field(default_factory=dict)
    """Descriptors of the claims of the trials that this process has asked for, by number."""

    def open(self) -> None:
        """Make the study, or find that it is the same search.

        Raises:
            ConfigError: another search is in the folder.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        make_folder(self.folder)
        described = json.dumps(
            {
                "space": {key: optuna.distributions.distribution_to_json(each) for key, each in self.space.items()},
                "objectives": {metric: goal.name for metric, goal in self.settings.goals.items()},
                "seed": self.settings.seed,
            },
            sort_keys=True,
        )
        with hold(self._file, wait=True):
            study = optuna.create_study(
                storage=open_storage(self._file),
                study_name=STUDY_NAME,
                directions=[optuna.study.StudyDirection[goal.name.upper()] for goal in self.settings.goals.values()],
                load_if_exists=True,
            )
            known = study.user_attrs.get("search")
            if known is None:
                study.set_user_attr("search", described)
                with without_experimental_warnings():
                    study.set_metric_names(list(self.settings.goals))
            elif known != described:
                raise ConfigError(f"{self.folder} holds another search; give another with hydra.sweep.dir=FOLDER.")

    def propose(self) -> Proposal | None:
        """The next trial, claimed: one that nobody runs any more, else a new one; None when there are enough."""
        with hold(self._file, wait=True):
            study = self._study()
            trials = study.get_trials(deepcopy=False)
            ended = {trial.number: trial for trial in read_trials(self.folder)}
            for trial in trials:
                if not trial.state.is_finished() and trial.number not in self._claims and self._claim(trial.number):
                    if is_ended(ended.get(trial.number)):
                        # Its process was killed before it could tell.
                        self._tell(study, ended[trial.number])
                        continue
                    return Proposal(trial.number, self._render(trial.params))
            if sum(_REFUSED not in trial.user_attrs for trial in trials) >= self.settings.trials:
                return None
            study.sampler = self._sampler(len(trials))
            asked = study.ask(fixed_distributions=self.space)
            self._claim(asked.number)
            return Proposal(asked.number, self._render(asked.params))

    def refuse(self, number: int) -> None:
        """Take back a proposal that no machine can hold; it does not count as a trial."""
        from optuna.trial import TrialState

        with hold(self._file, wait=True):
            study = self._study()
            trial_of(study, number).set_user_attr(_REFUSED, True)
            study.tell(number, state=TrialState.FAIL)
        self._release(number)

    def tell(self, number: int) -> None:
        """Tell the study what became of a trial; one that is interrupted stays open, and is proposed again."""
        with hold(self._file, wait=True):
            trial = next((each for each in read_trials(self.folder) if each.number == number), None)
            if trial is not None and is_ended(trial):
                self._tell(self._study(), trial)
        self._release(number)

    def release_all(self) -> None:
        """Let others have the trials that this process has asked for and not told of."""
        for number in list(self._claims):
            self._release(number)

    def _tell(self, study: "Study", trial: Trial) -> None:
        from optuna.trial import TrialState

        values = [trial.values[metric] for metric in self.settings.goals if metric in trial.values]
        if trial.state is State.finished and len(values) == len(self.settings.goals):
            study.tell(trial.number, values)
        elif trial.state is State.pruned:
            study.tell(trial.number, state=TrialState.PRUNED)
        else:
            study.tell(trial.number, state=TrialState.FAIL)

    def _study(self) -> "Study":
        return load_study(self._file)

    def _sampler(self, number: int) -> Any:
        from optuna.samplers import TPESampler

        seed = int.from_bytes(hashlib.sha256(f"{self.settings.seed}-{number}".encode()).digest()[:4])
        with without_experimental_warnings():
            # Trials that others run count as bad ones, so that nobody tries the same again.
            return TPESampler(seed=seed, n_startup_trials=self.settings.startup_trials, constant_liar=True)

    def _render(self, params: Mapping[str, Any]) -> list[str]:
        return [f"{key}={params[key]}" for key in self.space]

    def _claim(self, number: int) -> bool:
        """Whether a trial is this process's from now on; not where its job goes on without who started it."""
        if is_held(self.folder, number):
            return False
        descriptor = lock_file(self._claim_file(number), wait=False)
        if descriptor is not None:
            self._claims[number] = descriptor
        return descriptor is not None

    def _release(self, number: int) -> None:
        self._claim_file(number).unlink(missing_ok=True)
        os.close(self._claims.pop(number))

    def _claim_file(self, number: int) -> Path:
        return self.folder / f".{number}.claim"

    @property
    def _file(self) -> Path:
        return self.folder / STUDY_FILE


def is_ended(trial: Trial | None) -> bool:
    """Whether a trial has come to an end from which it does not go on."""
    return trial is not None and trial.state in (State.finished, State.failed, State.pruned, State.refused)


@contextmanager
def without_experimental_warnings() -> Iterator[None]:
    """Optuna 4 warns of what Optuna 5 has kept."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def open_storage(file: Path) -> Any:
    """The SQLite file of a study, as `optuna-dashboard` opens it too."""
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import URL
    from sqlalchemy.exc import SQLAlchemyError

    # A folder's name may hold what an address gives a meaning to.
    address = URL.create("sqlite", database=str(file.absolute())).render_as_string()
    try:
        return RDBStorage(address, engine_kwargs={"connect_args": {"timeout": _LOCK_SECONDS}})
    except SQLAlchemyError as error:
        raise DiskError(f"{file} is no study that can be read; put it back, or search in another folder.") from error


def load_study(file: Path) -> "Study":
    """The study in a file."""
    import optuna

    return optuna.load_study(storage=open_storage(file), study_name=STUDY_NAME)


def trial_of(study: "Study", number: int) -> Any:
    """A trial by its number, to be reported to from any process."""
    from optuna.trial import Trial as OptunaTrial

    storage = study._storage
    return OptunaTrial(study, storage.get_trial_id_from_study_id_trial_number(study._study_id, number))


class Follower(threading.Thread):
    """Reports each evaluation of a running trial to the study, and asks for its end once when it is to be pruned."""

    def __init__(self, folder: Path, metric: str, study: "Study", ask_to_end: Any) -> None:
        super().__init__(daemon=True)
        self._folder, self._metric, self._ask_to_end = folder, metric, ask_to_end
        self._trial = trial_of(study, int(folder.name))
        self._reported = set(find_trial(study, int(folder.name)).intermediate_values)
        self._ended = threading.Event()
        self.pruned = False

    def run(self) -> None:
        """Follow metrics.jsonl until the trial has ended or is pruned."""
        while not self._ended.wait(_FOLLOW_SECONDS):
            if self.report():
                self.pruned = True
                self._ask_to_end()
                return

    def report(self) -> bool:
        """Report what is new; whether the trial is to be pruned. The evaluation before training is none of its own."""
        new = {
            step: values[self._metric]
            for step, values in evaluated_values(self._folder).items()
            if step > 0 and step not in self._reported and self._metric in values
        }
        for step, value in new.items():
            self._trial.report(value, step)
            self._reported.add(step)
        return bool(new) and bool(self._trial.should_prune())

    def close(self) -> None:
        """Follow no longer."""
        self._ended.set()
        self.join()


@contextmanager
def follow_trial(folder: Path, settings: SweepConfig, ask_to_end: Any) -> Iterator[Follower | None]:
    """While the block runs, `ask_to_end` once if the pruner says so; nothing without a pruner."""
    if settings.pruner is Pruner.none:
        yield None
        return
    import optuna

    study = load_study(folder.parent / STUDY_FILE)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=settings.prune_after_trials)
    follower = Follower(folder, next(iter(settings.goals)), study, ask_to_end)
    follower.start()
    try:
        yield follower
    finally:
        follower.close()


def find_trial(study: "Study", number: int) -> "FrozenTrial":
    """What a study knows of a trial."""
    return study.get_trials(deepcopy=False)[number]


def check_objectives(trials: list[Trial], goals: Mapping[str, Goal]) -> None:
    """Raise ConfigError where a finished trial has not measured an objective, as none of the others will."""
    for trial in trials:
        missing = [metric for metric in goals if metric not in trial.values]
        if trial.state is State.finished and missing:
            raise ConfigError(
                f"sweep.objectives names {missing[0]}, which job {trial.number} has not measured; it has "
                f"{', '.join(sorted(trial.values)) or 'no held-out text'}."
            )
