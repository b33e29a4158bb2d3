"""Content hashes of files, remembered so that a second start reads no file again."""

import hashlib
import json
import os
import re
from pathlib import Path

_SHA256 = re.compile("[0-9a-f]{64}")
MEMORY = "file_hashes.json"


def hash_files(files: list[Path], cache_dir: Path) -> dict[Path, str]:
    """sha256 of each file; one whose size, times and inode are known from before is not read."""
    memory_file = cache_dir / MEMORY
    memory = read_memory(memory_file)
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
        staged = memory_file.with_name(f"{MEMORY}.{os.getpid()}")
        staged.write_text(json.dumps(memory | new, indent=0))
        staged.replace(memory_file)
    return hashes


def read_memory(file: Path) -> dict[str, str]:
    """What is remembered; nothing where the file is missing or damaged, since all of it can be had again."""
    try:
        memory = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    known = memory.items() if isinstance(memory, dict) else ()
    return {name: digest for name, digest in known if isinstance(digest, str) and _SHA256.fullmatch(digest)}


def hash_file(file: Path) -> str:
    """sha256 of the file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
