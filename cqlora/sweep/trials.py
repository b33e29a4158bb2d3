"""trials.jsonl in a sweep's folder: what became of each job; grid, search and W&B's agent write it alike."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from cqlora.config.secrets import holds_secret
from cqlora.errors import ConfigError, DoesNotFit, Preempted, Pruned
from cqlora.system.durable import is_locked, lock_file, make_folder, sync
from cqlora.system.journal import append_object, read_objects, tell_damage
from cqlora.system.metrics import evaluated_values
from cqlora.system.signals import Stopped

TRIALS_FILE = "trials.jsonl"


class State(StrEnum):
    """What became of a trial; all but `running` are ends, though `interrupted` goes on when it is started again."""

    running = "running"
    finished = "finished"
    failed = "failed"
    interrupted = "interrupted"
    pruned = "pruned"
    refused = "refused"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One job of a sweep, as its line in trials.jsonl tells it."""

    number: int
    folder: str
    """The run's, as it is found from the sweep's."""
    overrides: dict[str, Any]
    state: State
    values: dict[str, float] = field(default_factory=dict)
    """What its last evaluation measured: `eval/loss`, `eval/wiki_zh/zh/bits_per_character`, …"""
    error: str | None = None
    """Why it did not finish, in one sentence."""
    seconds: float = 0.0
    """Since it was last started."""
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """When the line was written (ISO 8601, UTC)."""


def read_trials(sweep: Path) -> list[Trial]:
    """The last line of each trial, by number; damaged lines are told and left out."""
    file, last = sweep / TRIALS_FILE, dict[int, Trial]()
    for number, row in read_objects(file):
        trial = to_trial(row or {})
        if trial is None:
            tell_damage(file, number)
        else:
            last[trial.number] = trial
    return [last[number] for number in sorted(last)]


def to_trial(row: dict[str, Any]) -> Trial | None:
    """A line's trial; None where it is not one, since a disk or a person may have changed it."""
    try:
        trial = Trial(**{**row, "state": State(str(row.get("state")))})
    except (TypeError, ValueError):
        return None
    whole = type(trial.number) is int and 0 <= trial.number < 1 << 31
    inside = isinstance(trial.folder, str) and len(trial.folder) < 256 and ".." not in Path(trial.folder).parts
    named = isinstance(trial.overrides, dict) and isinstance(trial.values, dict)
    if not (whole and inside and named) or Path(trial.folder).is_absolute():
        return None
    told = trial.error is None or isinstance(trial.error, str)
    numbers = all(
        type(value) is float or (type(value) is int and abs(value) < 1 << 53) for value in trial.values.values()
    )
    return trial if told and numbers else None


def append_trial(sweep: Path, trial: Trial) -> None:
    """Add a trial's line and wait until the disk has it.

    Raises:
        DiskError: the disk refused.
    """
    make_folder(sweep)
    if trial.error is not None and holds_secret(trial.error):
        trial = replace(trial, error="its error holds a secret and is not written down.")
    append_object(sweep / TRIALS_FILE, asdict(trial))
    sync(sweep / TRIALS_FILE)


@contextmanager
def record_trial(sweep: Path, folder: Path, overrides: dict[str, Any]) -> Iterator[None]:
    """Write down that a job runs, and when the block ends how it ended; the exception goes on its way.

    Raises:
        ConfigError: another process runs this job now.
    """
    started = time.monotonic()
    number = int(folder.name)
    place = os.path.relpath(folder, sweep)
    begun = Trial(number=number, folder=place, overrides=overrides, state=State.running)
    with hold_trial(sweep, number):
        append_trial(sweep, begun)
        state, error = State.failed, "ended without a word."
        try:
            yield
            state, error = State.finished, ""
        except BaseException as raised:
            state, error = state_after(raised), describe(raised)
            raise
        finally:
            values = next(reversed(evaluated_values(folder).values()), {})
            seconds = round(time.monotonic() - started, 1)
            ended = Trial(
                number=number,
                folder=place,
                overrides=overrides,
                state=state,
                values=values,
                error=error or None,
                seconds=seconds,
            )
            append_trial(sweep, ended)


def refuse_trial(
    sweep: Path, number: int, overrides: dict[str, Any], reason: str, state: State = State.refused
) -> None:
    """Write down a job that is not started, and why."""
    refused = Trial(number=number, folder=str(number), overrides=overrides, state=state, error=reason)
    append_trial(sweep, refused)


@contextmanager
def hold_trial(sweep: Path, number: int) -> Iterator[None]:
    """Be the one process that runs a trial; the system lets go when the process ends, however it ends."""
    make_folder(sweep)
    file = lock_of(sweep, number)
    descriptor = lock_file(file, wait=False)
    if descriptor is None:
        raise ConfigError(
            f"another process runs job {number} of {sweep}; wait for it, or give another hydra.sweep.dir."
        )
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def is_held(sweep: Path, number: int) -> bool:
    """Whether a process runs a trial now."""
    return is_locked(lock_of(sweep, number))


def lock_of(sweep: Path, number: int) -> Path:
    """The hidden file that a trial's process holds."""
    return sweep / f".{number}.lock"


def state_after(raised: BaseException) -> State:
    """What an exception makes of a trial."""
    if isinstance(raised, Pruned):
        return State.pruned
    if isinstance(raised, DoesNotFit):
        return State.refused
    # A job that Slurm queues again leaves with Preempted's code.
    left = isinstance(raised, SystemExit) and raised.code == Preempted.exit_code
    return State.interrupted if left or isinstance(raised, Preempted | Stopped | KeyboardInterrupt) else State.failed


def describe(raised: BaseException) -> str:
    """An exception in one sentence."""
    told = str(raised).partition("\n")[0].strip()
    if isinstance(raised, Stopped):
        return f"stopped by {raised.name}."
    return told or f"{type(raised).__name__}."
