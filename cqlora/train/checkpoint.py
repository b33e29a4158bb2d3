"""Checkpoint folders that appear whole or not at all, are verified before they are trusted, and never all pruned."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cqlora.errors import CheckpointError
from cqlora.system.durable import recover_folders, swap_in, sync, write_durably
from cqlora.system.sealed import hash_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_STAGING_SUFFIX = ".staging"
_MANIFEST_BYTES = 16 << 20
"""A hundred bytes for each of three files of 50,000 workers."""


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The checkpoints of one run, `root`/step-00000050 and so on."""

    root: Path
    keep_last: int
    """Verified checkpoints to keep; older ones go after a new one has been verified."""

    def stage(self, step: int) -> Path:
        """An empty folder for a checkpoint's files; it counts for nothing until `commit`."""
        staging = self.root / f"{folder_name(step)}{_STAGING_SUFFIX}"
        try:
            for leftover in self.root.glob(f"step-*{_STAGING_SUFFIX}"):
                shutil.rmtree(leftover)
            staging.mkdir(parents=True)
        except OSError as error:
            raise self._not_written(step, error) from error
        return staging

    def write(self, step: int, name: str, content: bytes) -> None:
        """Put one file into the staged checkpoint of `step`, on the disk and not in its cache."""
        try:
            write_durably(self.root / f"{folder_name(step)}{_STAGING_SUFFIX}" / name, content)
        except OSError as error:
            raise self._not_written(step, error) from error

    def commit(self, step: int) -> Path:
        """Make the staged checkpoint of `step` count: manifest last, rename, sync; then prune older ones.

        Raises:
            CheckpointError: the disk refused; what was committed before stands.
        """
        folder = self.root / folder_name(step)
        staging = folder.with_name(folder.name + _STAGING_SUFFIX)
        try:
            digests = {file.name: hash_file(file) for file in sorted(staging.iterdir())}
            write_durably(staging / MANIFEST, json.dumps(digests, indent=2).encode())
            sync(staging)
            swap_in(staging, folder)
        except OSError as error:
            raise self._not_written(step, error) from error
        self._prune()
        return folder

    def committed(self) -> list[Path]:
        """Committed checkpoints, newest first; whatever else lies beside them is somebody else's."""
        return sorted((each for each in self.root.glob("step-*") if is_checkpoint(each)), reverse=True)

    def find_newest(self, on_reject: Callable[[Path, str], None]) -> Path | None:
        """The newest checkpoint whose every file is as it was written; None where there are none at all.

        `on_reject` is called with each newer one that is damaged, and how.

        Raises:
            CheckpointError: there are checkpoints and none is whole.
        """
        recover_folders(self.root)
        folders = self.committed()
        for folder in folders:
            damage = find_damage(folder)
            if damage is None:
                return folder
            on_reject(folder, damage)
        if folders:
            raise CheckpointError(
                f"none of the {len(folders)} checkpoints in {self.root} is whole; start anew in another folder with "
                "hydra.run.dir=FOLDER."
            )
        return None

    def _prune(self) -> None:
        whole = 0
        for folder in self.committed():
            if whole >= self.keep_last:
                shutil.rmtree(folder)
            elif find_damage(folder) is None:
                whole += 1

    def _not_written(self, step: int, error: OSError) -> CheckpointError:
        shutil.rmtree(self.root / f"{folder_name(step)}{_STAGING_SUFFIX}", ignore_errors=True)
        last = next(iter(self.committed()), None)
        kept = f"the last checkpoint, {last}, stands" if last else "there is no earlier checkpoint"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.root} ({error.strerror or error}); {kept}: "
            "free some space and start the same command with hydra.run.dir again."
        )


def folder_name(step: int) -> str:
    """A checkpoint's folder name, which sorts by step."""
    return f"step-{step:08d}"


def is_checkpoint(path: Path) -> bool:
    """Whether a path has the name of a committed checkpoint and is a folder."""
    return re.fullmatch(r"step-\d{8,}", path.name) is not None and path.is_dir()


def step_of(folder: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(folder.name.removeprefix("step-"))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None when all are as they were written."""
    try:
        digests = read_manifest(folder)
        for name, digest in digests.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if hash_file(folder / name) != digest:
                return f"{name} is not as it was written (sha256 differs)"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror or error})"
    return None


def read_manifest(folder: Path) -> dict[str, str]:
    """sha256 of each of a checkpoint's files by name.

    Raises:
        CheckpointError: it is not there or nothing that `commit` has written; what is wrong, in a few words.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"no {MANIFEST}")
    if file.stat().st_size > _MANIFEST_BYTES:
        raise CheckpointError(f"{MANIFEST} has {file.stat().st_size:,} bytes, more than any")
    try:
        digests = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise CheckpointError(f"{MANIFEST} is not JSON") from None
    if not isinstance(digests, dict) or not digests:
        raise CheckpointError(f"{MANIFEST} names no files")
    for name, digest in digests.items():
        if not is_file_name(name) or not isinstance(digest, str):
            raise CheckpointError(f"{MANIFEST} has {name[:40]!r}, which is no file of a checkpoint with its sha256")
    return digests


def is_file_name(name: str) -> bool:
    """Whether a name stays in its folder and can be one."""
    return name.isprintable() and not set(name) & set("/\\") and name not in ("", ".", "..") and len(name) < 256
