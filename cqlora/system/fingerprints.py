"""sha256 of files and of a model's tensors, in parallel, remembered while a file stays the one that was read.

A digest is remembered in the user's cache folder under the file's device and inode, with its size and its times of
change. It is taken again only where all of them agree, and never kept of a file that was changed within the last
seconds, since a change within one tick of a file system's clock would show in none of them.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cqlora.errors import DiskError, ModelError
from cqlora.system.durable import replace_file
from cqlora.system.machine import cache_folder
from cqlora.system.sealed import hash_document, read_sealed, seal_document
from cqlora.system.tensor_files import StoredTensor, open_plain

VERSION = "v2-"
"""Before every fingerprint. Those without it are of the time when 64 samples a file were hashed."""
SETTLED_SECONDS = 2.0
"""Age of a file's last change from which its times tell a later change: the coarsest clock ticks once in two."""
_CHUNK_BYTES = 4 << 20
_FREE_CONFIG_KEYS = ("_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache")
"""Keys of config.json that decide no number."""


class Described(Protocol):
    """A tensor's description, wherever its bytes are."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def dtype(self) -> str:
        """safetensors' name of its type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


def combine(config: dict[str, Any], tensors: Iterable[Described], digests: Mapping[str, str]) -> str:
    """The fingerprint of a model: what of config.json decides numbers; name, type, shape and bytes of every tensor.

    How the tensors are spread over files does not count.
    """
    description = {
        "config": {key: value for key, value in config.items() if key not in _FREE_CONFIG_KEYS and value is not None},
        "tensors": sorted([tensor.name, tensor.dtype, *tensor.shape, digests[tensor.name]] for tensor in tensors),
    }
    return VERSION + hash_document(description)


def hash_whole(file: Path) -> str:
    """sha256 of a file's bytes, remembered.

    Raises:
        ModelError: it cannot be read.
    """

    def compute(stream: Any) -> dict[str, str]:
        return {"": _hash_range(stream, 0, os.fstat(stream.fileno()).st_size, file)}

    return _remembered(file, "whole", compute)[""]


def hash_tensors(tensors: Iterable[StoredTensor]) -> dict[str, str]:
    """sha256 of each tensor's bytes, by its name; the files are hashed in parallel and remembered.

    Raises:
        ModelError: a file cannot be read, ends too early, or changed meanwhile.
    """
    by_file: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    digests: dict[str, str] = {}
    for file, held in by_file.items():
        found = _remembered(file, "tensors", partial(_hash_held, tensors=held))
        digests |= {tensor.name: found[tensor.name] for tensor in held}
    return digests


def _hash_held(stream: Any, tensors: list[StoredTensor]) -> dict[str, str]:
    """The digests of one file's tensors; hashing and reading let other threads run."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda tensor: _hash_range(stream, tensor.start, tensor.nbytes, tensor.file), tensors)
        return {tensor.name: digest for tensor, digest in zip(tensors, digests, strict=True)}


def _hash_range(stream: Any, start: int, count: int, file: Path) -> str:
    digest, end = hashlib.sha256(), start + count
    while start < end:
        chunk = os.pread(stream.fileno(), min(_CHUNK_BYTES, end - start), start)
        if not chunk:
            raise ModelError(f"{file} ends before its data does; it is truncated, fetch it again.")
        digest.update(chunk)
        start += len(chunk)
    return digest.hexdigest()


def _remembered(file: Path, kind: str, compute: Callable[[Any], dict[str, str]]) -> dict[str, str]:
    """Digests of parts of a file, computed unless the very same file's are remembered."""
    try:
        with open_plain(file) as stream:
            before, started = _state_of(stream), time.time()
            place = _place(before, kind)
            known = _recall(place, before)
            if known is not None:
                return known
            digests = compute(stream)
            if _state_of(stream) != before:
                raise ModelError(f"{file} was changed while it was read; wait until it is written, then start again.")
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror or error}); check the file.") from error
    if started - max(before["changed_ns"], before["modified_ns"]) / 1e9 > SETTLED_SECONDS:
        # A cache folder that cannot be written to only means that the file is read again.
        with suppress(DiskError):
            replace_file(place, seal_document({"state": before, "digests": digests}))
    return digests


def _state_of(stream: Any) -> dict[str, int]:
    """What tells a file from every other, and from itself before a change; no program can set the time of change."""
    found = os.fstat(stream.fileno())
    return {
        "device": found.st_dev, "inode": found.st_ino, "size": found.st_size,
        "modified_ns": found.st_mtime_ns, "changed_ns": found.st_ctime_ns,
    }  # fmt: skip


def _place(state: dict[str, int], kind: str) -> Path:
    return cache_folder("fingerprints") / f"{state['device']:x}-{state['inode']:x}.{kind}.json"


def _recall(place: Path, state: dict[str, int]) -> dict[str, str] | None:
    """The digests that are kept of a file in this state; None where they are missing, damaged or of another state."""
    with suppress(OSError):
        kept = read_sealed(place)
        if kept is not None and kept.get("state") == state:
            digests: dict[str, str] = kept["digests"]
            return digests
    return None
