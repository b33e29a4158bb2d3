"""Files and folders that appear whole or not at all, whatever happens meanwhile and whoever else writes.

What is written goes to a temporary name beside its place, is fsynced and renamed; then the folder is fsynced. A
reader sees what was there before or what is new, never a part.
"""

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from cqlora.errors import DiskError, ModelError
from cqlora.system.refusals import described_as_sentence

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_PARTIAL = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.partial")
_ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.old")


def replace_file(file: Path, content: bytes) -> None:
    """Put `content` in the place of `file`.

    Raises:
        DiskError: the system refused; what was there before stands.
    """
    with staged_file(file, len(content)) as staged:
        staged.write_bytes(content)


@contextmanager
def staged_file(file: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Give a file to write to, which takes the place of `file` when the block ends without an exception.

    Several writers at once do not meet: each has a temporary file of its own, and the last to finish wins.

    Raises:
        DiskError: the system refused; what was there before stands.
    """
    place = Path(os.path.realpath(file))
    with described_as_sentence(file, place.parent, needed_bytes):
        make_folder(place.parent)
        remove_leftovers(place.parent, place.name)
        staged, descriptor = create_held_file(place)
        try:
            yield staged
            sync(staged)
            staged.rename(place)
            sync(place.parent)
        finally:
            staged.unlink(missing_ok=True)
            os.close(descriptor)


@contextmanager
def staged_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder to fill, which becomes `target` when the block ends without an exception.

    It is hidden and lies beside `target`. With `replace` it takes the place of a folder that is there, which is
    whole under its name until then.

    Raises:
        ModelError: `target` is already there, and not to be replaced.
        DiskError: another process writes to `target`, or the system refused; nothing is left.
    """
    with hold(target), stage(target, replace) as staging:
        yield staging


@contextmanager
def hold(target: Path, wait: bool = False) -> Iterator[None]:
    """Be the one process that writes to `target`, for as long as the block runs.

    The system lets go when the process ends, however it ends. The hidden lock file beside `target` is removed.

    Raises:
        DiskError: another process writes to `target`, and this one is not to `wait` until it has ended.
    """
    place = Path(os.path.realpath(target))
    lock = place.with_name(f".{place.name}.lock")
    with described_as_sentence(target, lock):
        make_folder(place.parent)
        descriptor = lock_file(lock, wait)
    if descriptor is None:
        raise DiskError(f"another process is writing to {target}; wait until it has ended, or give another folder.")
    try:
        yield
    finally:
        # While it is held: whoever has opened the file meanwhile finds that it is no longer there, and makes another.
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


@contextmanager
def stage(target: Path, replace: bool = False) -> Iterator[Path]:
    """As staged_folder, for a caller that holds `target` already."""
    place = Path(os.path.realpath(target))
    if not replace:
        refuse_existing(target)
    staging = place.with_name(f".{place.name}.{secrets.token_hex(8)}.partial")
    try:
        with described_as_sentence(target, staging):
            recover_folder(place)
            remove_leftovers(place.parent, place.name)
            staging.mkdir()
            yield staging
            sync_tree(staging)
            if not replace:
                refuse_existing(target)
            swap_in(staging, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    """Raise ModelError where `target` holds something already."""
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ModelError(f"{target} is already there; choose another output_dir or remove it first.")


def swap_in(staging: Path, target: Path) -> None:
    """Give a folder that the disk has the name `target`; a folder that had it before is removed afterwards.

    Where the system cannot exchange two names at one instant (an NFS server, macOS), the older folder has a hidden
    name for a moment, from which `recover_folder` brings it back.
    """
    if target.is_dir() and any(target.iterdir()):
        old = staging
        if not exchange(staging, target):
            old = target.with_name(f".{target.name}.{secrets.token_hex(8)}.old")
            target.rename(old)
            staging.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    else:
        # A folder takes the place of an empty one at one instant.
        staging.rename(target)
        sync(target.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names at one instant; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    swapped: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return swapped == 0


def recover_folders(parent: Path) -> None:
    """Bring back every folder of `parent` that a writer was killed over, unless a writer is at it now.

    For readers. To one without the right to rename, the folder is missing.
    """
    with suppress(OSError):
        _recover_folders(parent)


def _recover_folders(parent: Path) -> None:
    for path in list_names(parent):
        aside = _ASIDE.fullmatch(path.name)
        if aside and (descriptor := lock_file(parent / f".{aside['name']}.lock", wait=False)) is not None:
            try:
                recover_folder(parent / aside["name"])
            finally:
                (parent / f".{aside['name']}.lock").unlink(missing_ok=True)
                os.close(descriptor)


def recover_folder(target: Path) -> None:
    """Give a folder its name back if a writer was killed between taking it away and giving it to another one.

    The caller holds `target`.
    """
    for path in list_names(target.parent):
        aside = _ASIDE.fullmatch(path.name)
        if aside and aside["name"] == target.name:
            if not target.exists():
                path.rename(target)
                sync(target.parent)
            else:
                shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(parent: Path, name: str = "") -> None:
    """Remove the files that killed writers have left in `parent`, of one target's `name` or of all.

    A file that its writer still holds stays. Folders go only with a `name`, whose target the caller holds.
    """
    for path in list_names(parent):
        leftover = _PARTIAL.fullmatch(path.name)
        if leftover is None or name not in ("", leftover["name"]):
            continue
        if path.is_dir():
            if name:
                shutil.rmtree(path, ignore_errors=True)
        elif (descriptor := lock_file(path, wait=False, create=False)) is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def create_held_file(target: Path) -> tuple[Path, int]:
    """An empty file beside `target`, and the descriptor that tells others that its writer lives."""
    while True:
        staged = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
        descriptor = lock_file(staged, wait=False)
        if descriptor is not None:
            return staged, descriptor


def lock_file(file: Path, wait: bool, create: bool = True) -> int | None:
    """A descriptor of the locked file; None where another process holds it, or it is not there and not to be made."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        except FileNotFoundError:
            if create:
                raise
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Its holder before may have removed it between these two calls.
            if os.stat(file).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def is_locked(file: Path) -> bool:
    """Whether a process holds a file's lock now; to ask takes no right to write."""
    try:
        with file.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def list_names(folder: Path) -> list[Path]:
    """What a folder holds; nothing where it is not there."""
    try:
        return list(folder.iterdir())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return []
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each known to the disk."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):
        sync(each.parent)


def require_place(file: Path) -> None:
    """Make a file's folder and see that it takes files, before the work whose result it is to hold.

    Raises:
        OSError: it does not.
    """
    make_folder(file.parent)
    with TemporaryFile(dir=file.parent):
        pass


def write_durably(file: Path, content: bytes) -> None:
    """Write a file that nobody looks for yet, and wait until the disk has it."""
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
        if not path.is_symlink():
            sync(path)
