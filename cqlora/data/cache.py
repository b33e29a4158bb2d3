"""The token cache: found by what it was made from, built once, trusted only when whole."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from cqlora.base import Base, fingerprint_tokenizer, write_json
from cqlora.config import RunConfig
from cqlora.data.build import Progress, build_cache
from cqlora.data.chat import TEMPLATE_VERSION
from cqlora.data.digests import hash_files
from cqlora.data.records import SPLITS
from cqlora.data.sources.location import Location, find_sources
from cqlora.data.store import Pack, Split
from cqlora.data.tokenizer import read_special_names
from cqlora.disk import sync, sync_tree
from cqlora.errors import DataError

__all__ = ["Pack", "SourceInfo", "Split", "TokenCache", "prepare_cache"]

FORMAT_VERSION = 3
"""Counts up whenever the same choices would give other bytes."""

MANIFEST = "cache.json"


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """A source and a language in it: what losses are told apart by."""

    name: str
    language: str
    """`zh`, `en` or `mixed`."""


class TokenCache:
    """A whole cache, open for reading."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: str = manifest["fingerprint"]
        self.sources = [SourceInfo(**source) for source in manifest["sources"]]
        self.summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        self.sequence_length: int = manifest["sequence_length"]
        dtype = np.dtype(manifest["dtype"])
        self.splits = {
            name: Split(folder / name, manifest["splits"][name], dtype, self.sequence_length) for name in SPLITS
        }


def prepare_cache(config: RunConfig, base: Base, progress: Progress | None = None) -> TokenCache:
    """Open the cache of these choices, building it first where there is none that is whole.

    Raises:
        DataError: a source is missing or cannot be read, or nothing is left to train on.
        ModelError: the base's tokenizer cannot encode what the stage asks for.
    """
    cache_dir = Path(config.data.cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    locations = find_sources(config.data, config.stage.name)
    fingerprint = fingerprint_choices(config, base, locations, cache_dir)
    folder = cache_dir / fingerprint[:32]
    manifest = read_manifest(folder)
    if manifest is None:
        with lock(cache_dir / f"{folder.name}.lock"):
            manifest = read_manifest(folder)
            if manifest is None:
                build_folder(config, base, locations, folder, fingerprint, progress or ignore_progress)
                manifest = read_manifest(folder)
                assert manifest is not None, "a cache just built is whole"
    return TokenCache(folder, manifest)


def fingerprint_choices(config: RunConfig, base: Base, locations: dict[str, Location], cache_dir: Path) -> str:
    """sha256 over everything that decides the cache's bytes, the sources' own content included."""
    files = hash_files([file.path for location in locations.values() for file in location.files], cache_dir)
    sources = {}
    for name, location in locations.items():
        source = plain(asdict(config.data.sources[name]))
        sources[name] = {
            **{key: value for key, value in source.items() if key not in ("path", "stages", "dataset", "subset")},
            "files": [[file.path.name, file.split, files[file.path]] for file in location.files],
            "dataset": [location.dataset, location.subset],
        }
    choices = {
        "format": FORMAT_VERSION,
        "template": TEMPLATE_VERSION,
        "tokenizer": fingerprint_tokenizer(base.path),
        "special": read_special_names(base.path),
        "stage": config.stage.name,
        "system_prompt": getattr(config.stage, "system_prompt", ""),
        "sequence_length": config.stage.sequence_length,
        "seed": config.seed,
        "sources": sources,
        "order": list(sources),
        "sample_evenly": config.data.sample_evenly,
        "held_out": [config.data.val_fraction, config.data.test_fraction],
        "clean": plain(asdict(config.data.clean)),
    }
    return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """The value with enumerations by name, as JSON can hold it."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value.value if isinstance(value, Enum) else value


def build_folder(
    config: RunConfig,
    base: Base,
    locations: dict[str, Location],
    folder: Path,
    fingerprint: str,
    progress: Progress,
) -> None:
    """Build into a staging folder and rename it when every byte is on the disk."""
    staging = folder.with_name(f"{folder.name}.partial")
    for leftover in (staging, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir()
    kept_rejections = folder.with_name(f"{folder.name}.rejected.jsonl")
    try:
        description = build_cache(config, locations, base.path, staging, kept_rejections, progress)
    except DataError:
        if (staging / "rejected.jsonl").is_file():
            (staging / "rejected.jsonl").replace(kept_rejections)
        shutil.rmtree(staging)
        raise
    write_json(staging / "summary.json", description.pop("summary"))
    description |= {"fingerprint": fingerprint, "files": file_sizes(staging)}
    write_json(staging / MANIFEST, description)
    sync_tree(staging)
    staging.rename(folder)
    sync(folder.parent)
    kept_rejections.unlink(missing_ok=True)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file under `folder`, by relative path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The cache's description, or None unless every file is there at its full size."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    sizes = file_sizes(folder)
    whole = all(sizes.get(name) == size for name, size in manifest["files"].items())
    return manifest if whole else None


@contextmanager
def lock(file: Path) -> Iterator[None]:
    """Hold a lock that the system releases when its holder ends, however it ends."""
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def ignore_progress(part: str, done: int, total: int | None) -> None:
    """Shows nothing."""
