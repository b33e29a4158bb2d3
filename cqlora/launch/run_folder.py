"""A run's folder belongs to one launch at a time, and stays only where a run was accepted in it."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cqlora.config.run_yaml import LOCK_FILE, RUN_FILE, STAGED_FILE
from cqlora.errors import ConfigError
from cqlora.launch.processes import WORKERS_FOLDER
from cqlora.sweep.trials import TRIALS_FILE

SWEEP_FILE = "multirun.yaml"

_missing: set[Path] = set()
"""Folders that were not there before this start."""
_sweeps: dict[Path, frozenset[str]] = {}
"""Folders of sweeps, with what was in them before this start."""


class NoteFolders(Callback):
    """Hydra makes a run's folder before anybody knows whether the run may start: this notes what was there before."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before the folder of a single run is made."""
        note_missing(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before the folder of a sweep is made, and those of its jobs in it."""
        folder = Path(config.hydra.sweep.dir).absolute()
        note_missing(folder)
        _sweeps[folder] = frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset()


def note_missing(folder: Path) -> None:
    """Remember which of a folder and the folders that it is in are not there."""
    folder = folder.absolute()
    _missing.update(each for each in (folder, *folder.parents) if not os.path.lexists(each))


def drop_unused(folder: Path) -> None:
    """Remove a folder that this start has made and nobody has used, and those around it of which that is true."""
    folder = folder.absolute()
    for each in (folder, *folder.parents):
        if not was_made_here(each):
            return
        try:
            each.rmdir()
        except OSError:
            # Something is in it.
            return


def drop_unused_sweeps() -> None:
    """Remove the folders of sweeps of which no job was accepted: lists of overrides and refusals are all they hold."""
    for folder, before in _sweeps.items():
        made = set(os.listdir(folder)) - before if os.path.isdir(folder) else set()
        if SWEEP_FILE in made and made <= {SWEEP_FILE, TRIALS_FILE}:
            for name in made:
                (folder / name).unlink()
            drop_unused(folder)


def was_made_here(folder: Path) -> bool:
    """Whether a folder was not there before this start."""
    if folder in _missing:
        return True
    for sweep, before in _sweeps.items():
        if sweep in folder.parents:
            return folder.relative_to(sweep).parts[0] not in before
    return False


@contextmanager
def hold_run_folder(run_folder: Path, given: bool) -> Iterator[Path]:
    """Hold a run folder for as long as the block runs; the system lets go when this process ends.

    A run folder that the user has `given` is taken as it is. One that was named after the time gets a number where
    another launch was as quick. Where no run was accepted in it, what its start has left is removed.

    Raises:
        ConfigError: another run is going on in the given run folder, or nothing can be written there.
    """
    number, candidate = 1, run_folder
    note_missing(candidate)
    while (descriptor := lock_writable(candidate)) is None:
        if given:
            raise ConfigError(f"another run is going on in {run_folder}; wait for it, or use hydra.run.dir=FOLDER.")
        number += 1
        candidate = run_folder.with_name(f"{run_folder.name}-{number}")
        note_missing(candidate)
    try:
        yield candidate
    finally:
        (candidate / STAGED_FILE).unlink(missing_ok=True)
        if not (candidate / RUN_FILE).exists():
            shutil.rmtree(candidate / WORKERS_FOLDER, ignore_errors=True)
        release(candidate, descriptor)
        drop_unused(candidate)


def lock_writable(folder: Path) -> int | None:
    """As try_lock, with a ConfigError for a folder in which nothing can be written."""
    try:
        return try_lock(folder)
    except OSError as error:
        raise ConfigError(describe_refusal(error, folder)) from error


def try_lock(folder: Path) -> int | None:
    """A descriptor of the folder's lock; None where another process holds it."""
    file = folder / LOCK_FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
        except FileNotFoundError:
            # Another launch let go of the folder meanwhile, and removed it as unused.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        # Its holder let go of it, and took the file away, after it was opened here.
        os.close(descriptor)


def release(folder: Path, descriptor: int) -> None:
    """Let go of a folder's lock."""
    (folder / LOCK_FILE).unlink(missing_ok=True)
    os.close(descriptor)


def describe_refusal(error: OSError, folder: Path) -> str:
    """The sentence for a folder in which no run can be written."""
    reason = (error.strerror or str(error)).lower()
    for each in (folder.absolute(), *folder.absolute().parents):
        if os.path.islink(each) and not os.path.exists(each):
            reason = f"{each} is a link to {os.readlink(each)}, which is not there"
        elif os.path.isfile(each):
            reason = f"{each} is a file"
    return f"the run cannot be written to {folder} ({reason}); choose another folder with hydra.run.dir=FOLDER."
