"""Content hashes of sources, remembered so that a second start reads none again, and of a cache's own files."""

import hashlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cqlora.data.workers import count_workers
from cqlora.errors import DiskError
from cqlora.system.durable import replace_file
from cqlora.system.sealed import hash_file, read_sealed, seal_document

logger = logging.getLogger(__name__)

MEMORY = "file_hashes.json"

BLOCK_BYTES = 32 << 20
_READ_BYTES = 1 << 20


def hash_files(files: list[Path], cache_dir: Path) -> dict[Path, str]:
    """sha256 of each file; one whose size, times and inode are known from before is not read."""
    memory_file = cache_dir / MEMORY
    memory: dict[str, str] = read_sealed(memory_file) or {}
    hashes: dict[Path, str] = {}
    new: dict[str, str] = {}
    for file in files:
        status = file.stat()
        times = f"{status.st_mtime_ns}:{status.st_ctime_ns}"
        identity = f"{file.resolve()}:{status.st_ino}:{status.st_size}:{times}"
        if identity not in memory:
            new[identity] = hash_file(file)
        hashes[file] = memory.get(identity) or new[identity]
    if new:
        remember(memory_file, memory | new)
    return hashes


def remember(memory_file: Path, memory: dict[str, str]) -> None:
    """Keep hashes for the next start, where the folder can be written to."""
    try:
        replace_file(memory_file, seal_document(memory))
    except DiskError as error:
        logger.warning("the sources will be read for their hashes again at the next start: %s", error)


def digest_files(files: Iterable[Path], tick: Callable[[int], None] = lambda done: None) -> dict[Path, str]:
    """A digest of each file: sha256 over the sha256 of its blocks of BLOCK_BYTES, computed on all cores.

    One core does about 1.5 GB/s (0.4 without the processor's instructions for it), so that a few do what a disk
    reads. `tick` is called with the bytes done so far.
    """
    sizes = {file: file.stat().st_size for file in files}
    blocks = [(file, start) for file, size in sizes.items() for start in range(0, size, BLOCK_BYTES)]
    joined = {file: hashlib.sha256() for file in sizes}
    done = 0
    with ThreadPoolExecutor(count_workers(None)) as pool:
        for (file, start), digest in zip(blocks, pool.map(_digest_block, blocks), strict=True):
            joined[file].update(digest)
            done += min(BLOCK_BYTES, sizes[file] - start)
            tick(done)
    return {file: digest.hexdigest() for file, digest in joined.items()}


def _digest_block(block: tuple[Path, int]) -> bytes:
    # Read and not mapped: where the disk fails, a mapped page ends the process instead of raising.
    file, start = block
    digest, left = hashlib.sha256(), BLOCK_BYTES
    buffer = memoryview(bytearray(_READ_BYTES))
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while left and (count := stream.readinto(buffer[: min(left, _READ_BYTES)])):
            digest.update(buffer[:count])
            left -= count
    return digest.digest()
