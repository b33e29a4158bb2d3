"""Checkpoint folders that appear whole or not at all, are verified before they are trusted, and never all go."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cqlora.errors import CheckpointError
from cqlora.system.durable import recover_folders, swap_in, sync, write_durably

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_STAGING_SUFFIX = ".staging"


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
            for leftover in self.root.glob(f"*{_STAGING_SUFFIX}"):
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
        """Committed checkpoints, newest first."""
        return sorted((folder for folder in self.root.glob("step-*") if folder.suffix != _STAGING_SUFFIX), reverse=True)

    def find_newest(self, on_reject: Callable[[Path, str], None]) -> Path | None:
        """The newest checkpoint whose every file is as it was written; None where there are none at all.

        `on_reject` is told of each newer one that is damaged, and how.

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


def step_of(folder: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(folder.name.removeprefix("step-"))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None when all are as they were written."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"no {MANIFEST}"
    try:
        digests = json.loads(manifest.read_bytes())
    except ValueError:
        return f"{MANIFEST} is not JSON"
    if not isinstance(digests, dict) or not digests:
        return f"{MANIFEST} names no files"
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if hash_file(file) != digest:
            return f"{name} is not as it was written (sha256 differs)"
    return None


def hash_file(file: Path) -> str:
    """sha256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
