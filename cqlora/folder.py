"""A run's folder belongs to one launch at a time, whatever second two of them start in."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cqlora.errors import ConfigError
from cqlora.frozen import RUN_FILE


@contextmanager
def hold_folder(folder: Path, given: bool) -> Iterator[Path]:
    """Hold a folder for as long as the block runs; the system lets go when this process ends.

    A folder that the user has `given` is taken as it is. One that was named after the time gets a number where
    another launch was as quick.

    Raises:
        ConfigError: another run is going on in the given folder.
    """
    number, candidate = 1, folder
    while (descriptor := try_lock(candidate)) is None:
        if given:
            raise ConfigError(f"another run is going on in {folder}; wait for it, or use hydra.run.dir=FOLDER.")
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    try:
        yield candidate
    finally:
        os.close(descriptor)


def try_lock(folder: Path) -> int | None:
    """A descriptor of the folder's run.yaml, locked; None where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / RUN_FILE, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
