"""Getting bytes onto the disk and not into its cache, which is what lets a rename mean that all is there."""

import os
from pathlib import Path


def write_durably(file: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    file.write_bytes(content)
    sync(file)


def sync(path: Path) -> None:
    """Wait until the disk has a file's bytes, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until the disk has everything under `folder`."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
