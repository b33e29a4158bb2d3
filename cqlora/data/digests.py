"""Content hashes of files, remembered so that a second start reads no file again."""

import hashlib
import json
from pathlib import Path

from cqlora.system.durable import replace_file

MEMORY = "file_hashes.json"


def hash_files(files: list[Path], cache_dir: Path) -> dict[Path, str]:
    """sha256 of each file; one whose size, times and inode are known from before is not read."""
    memory_file = cache_dir / MEMORY
    memory: dict[str, str] = json.loads(memory_file.read_text()) if memory_file.is_file() else {}
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
        replace_file(memory_file, json.dumps(memory | new, indent=0).encode())
    return hashes


def hash_file(file: Path) -> str:
    """sha256 of the file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
