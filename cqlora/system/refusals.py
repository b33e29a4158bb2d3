"""One sentence for what the operating system refuses: the path, the reason, what to do."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cqlora.errors import CqloraError, DiskError

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers, which are written in Rust, end the message of an operating system's error."""
_NUMPY_ERROR = re.compile(r"\d+ requested and \d+ written")
"""What numpy's `tofile` says of a disk that took less, without the system's number."""

_REASONS = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "your quota of disk space is used up",
    errno.EFBIG: "the file system or `ulimit -f` allows no file as large as that",
    errno.EROFS: "it lies on a read-only file system; give a folder that can be written to",
    errno.EACCES: "this user has no right to; change the rights or give another path",
    errno.EPERM: "this user has no right to; change the rights or give another path",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    errno.ENOTDIR: "a part of the path is a file and not a folder; give another path",
    errno.EISDIR: "it is a folder where a file is expected; give another path or move it away",
    errno.EEXIST: "something else is there already; give another path or move it away",
    errno.ENOTEMPTY: "something else is there already; give another path or move it away",
    errno.ENOENT: "it does not exist; give another path or make it first",
    errno.ELOOP: "its links lead in a circle; give another path",
    errno.EIO: "the disk failed to read or write; look at the system's log before trusting it again",
    errno.EBUSY: "it is in use, perhaps as a mount point; give a folder inside it",
    errno.EXDEV: "it lies on another file system; give another path",
    errno.ESTALE: "the file server no longer knows it; mount it again",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine; close other programs",
    errno.ENOLCK: "the file system has no locks; give a folder on another one",
    errno.ENOSYS: "the file system cannot do that; give a folder on another one",
    errno.EOPNOTSUPP: "the file system cannot do that; give a folder on another one",
}
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


class NoRoom(OSError):
    """Less is free than is going to be written."""

    def __init__(self, needed_bytes: int) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.needed_bytes = needed_bytes


def explain_os_error(error: OSError, path: Path | None = None, needed_bytes: int = 0) -> DiskError:
    """The error as a sentence about `path`, which was to be written; where that is None, about what it names itself.

    `needed_bytes` is how much was to be written, where that is known.
    """
    needed_bytes = error.needed_bytes if isinstance(error, NoRoom) else needed_bytes
    named = find_place(error)
    place = path or (Path(named) if named else None)
    subject = shorten(place) if place else "a file"
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error) or type(error).__name__)
    if error.errno in _OUT_OF_SPACE:
        room = f" and {needed_bytes:,} bytes are needed" if needed_bytes else ""
        free = f"; {free_bytes(place):,} bytes are free{room}" if place else ""
        reason += f"{free}: make room and type the same command again"
    return DiskError(f"{subject} could not be {'written' if path else 'read or written'}: {reason}.")


def find_place(error: OSError) -> str | None:
    """The path that an error names; where a copy found no room, the copy and not what was copied."""
    named = error.filename2 if error.errno in _OUT_OF_SPACE and error.filename2 else error.filename
    return os.fsdecode(named) if isinstance(named, str | bytes) else None


def find_os_error(error: BaseException) -> OSError | None:
    """The operating system's error that `error` is or was made from; None where it has nothing to do with a file."""
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError):
        if _NUMPY_ERROR.fullmatch(str(error)):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return error if error.errno else None
    match = None if isinstance(error, CqloraError) else _RUST_ERROR.search(str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


@contextmanager
def described_as_sentence(
    path: Path | None = None, staging: Path | None = None, needed_bytes: int = 0
) -> Iterator[None]:
    """Raise what the operating system refuses in the block as a DiskError.

    It is about `path` unless the error names another; what lies in `staging`, which will be gone, is not named.
    """
    try:
        yield
    except Exception as error:
        refused = find_os_error(error)
        if refused is None:
            raise
        named = find_place(refused)
        own = named is None or (staging is not None and Path(named).is_relative_to(staging))
        raise explain_os_error(refused, path if own else None, needed_bytes) from error


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise NoRoom where `folder` has no room for so many bytes, before the work that they come of is done."""
    if 0 <= free_bytes(folder) < needed_bytes:
        raise NoRoom(needed_bytes)


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write where `path` lies or would lie; -1 where nothing is known of it."""
    for folder in (path, *path.absolute().parents):
        try:
            usage = shutil.disk_usage(folder)
        except OSError:
            continue
        return usage.free if usage.total else -1
    return -1


def shorten(path: Path) -> str:
    """A path as a sentence can hold it."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:90]}…{text[-90:]}"
