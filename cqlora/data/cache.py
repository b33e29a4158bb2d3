"""The token cache: found by what it was made from, built once, trusted only when every byte is as it was written."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cqlora.base import Base, fingerprint_tokenizer
from cqlora.config.choices import Thinking
from cqlora.config.run_yaml import to_plain
from cqlora.config.schema import RunConfig
from cqlora.data.build import ReportProgress, build_cache
from cqlora.data.chat import TEMPLATE_VERSION
from cqlora.data.digests import digest_files, hash_files
from cqlora.data.records import SPLITS
from cqlora.data.sources.location import Location, find_sources
from cqlora.data.store import Pack, Split
from cqlora.data.templates import ChatForm, form_of_stage
from cqlora.data.tokenizer import read_special_names
from cqlora.errors import DataError
from cqlora.system.documents import write_json
from cqlora.system.durable import hold, make_folder, stage, write_durably
from cqlora.system.refusals import described_as_sentence
from cqlora.system.sealed import hash_document, read_sealed, seal_document

logger = logging.getLogger(__name__)

__all__ = ["Pack", "SourceInfo", "Split", "TokenCache", "prepare_cache"]

FORMAT_VERSION = 4
"""Counts up whenever the same choices would give other bytes."""

MANIFEST = "cache.json"


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """A source and one of its languages: losses are reported for each such pair."""

    name: str
    language: str
    """`zh`, `en` or `mixed`."""


def unevaluated_sources(cache: "TokenCache") -> list[str]:
    """Names of the sources that train and have no validation text."""
    found = cache.summary["sources"].items()
    return [name for name, totals in found if totals["kept"]["train"] and not totals["kept"]["val"]]


class TokenCache:
    """A whole cache, open for reading."""

    def __init__(self, folder: Path) -> None:
        """Open a folder in which `find_damage` found none."""
        manifest = read_sealed(folder / MANIFEST)
        assert manifest is not None, "it has just been read, or written"
        self.folder = folder
        self.fingerprint: str = manifest["fingerprint"]
        self.sources = [SourceInfo(**source) for source in manifest["sources"]]
        self.summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        self.sequence_length: int = manifest["sequence_length"]
        dtype = np.dtype(manifest["dtype"])
        self.splits = {
            name: Split(folder / name, manifest["splits"][name], dtype, self.sequence_length) for name in SPLITS
        }


def prepare_cache(
    config: RunConfig, base: Base, progress: ReportProgress | None = None, verify: bool = True
) -> TokenCache:
    """Open the cache of these choices, building it first where there is none that is as it was written.

    Args:
        config: the run's configuration.
        base: the model whose tokenizer makes the tokens.
        progress: called with what is being done.
        verify: read every byte of it and compare, rather than sizes alone.

    Raises:
        DataError: a source is missing or cannot be read, or nothing is left to train on.
        ModelError: the base's tokenizer cannot encode what the stage asks for.
        DiskError: the cache cannot be written.
    """
    cache_dir, progress = Path(config.data.cache_dir), progress or ignore_progress
    locations = find_sources(config.data, config.stage.name)
    with described_as_sentence(cache_dir):
        make_folder(cache_dir)
        fingerprint = fingerprint_choices(config, base, locations, cache_dir)
        folder = cache_dir / fingerprint[:32]
        if find_damage(folder, verify, progress):
            with hold(folder, wait=True):
                damage = find_damage(folder, verify, progress)
                if damage and folder.exists():
                    logger.warning("the token cache %s is damaged (%s) and is built anew", folder, damage)
                if damage:
                    build_folder(config, base, locations, folder, fingerprint, progress)
        return TokenCache(folder)


def fingerprint_choices(config: RunConfig, base: Base, locations: dict[str, Location], cache_dir: Path) -> str:
    """sha256 over everything that decides the cache's bytes, the sources' own content included."""
    files = hash_files([file.path for location in locations.values() for file in location.files], cache_dir)
    sources = {}
    for name, location in locations.items():
        source = to_plain(asdict(config.data.sources[name]))
        sources[name] = {
            **{key: value for key, value in source.items() if key not in ("path", "stages", "dataset", "subset")},
            "files": [[file.path.name, file.split, files[file.path]] for file in location.files],
            "dataset": [location.dataset, location.subset],
            **({"entry": asdict(location.entry)} if location.entry else {}),
        }
    choices = {
        "format": FORMAT_VERSION,
        "template": describe_template(form_of_stage(config.stage, base.path)),
        "tokenizer": fingerprint_tokenizer(base.path),
        "special": read_special_names(base.path),
        "stage": config.stage.name,
        "system_prompt": getattr(config.stage, "system_prompt", ""),
        "sequence_length": config.stage.sequence_length,
        "seed": config.seed,
        "sources": sources,
        "order": list(sources),
        "sample_evenly": config.data.sample_evenly,
        "replay": config.data.replay,
        "held_out": [config.data.val_fraction, config.data.test_fraction],
        "clean": to_plain(asdict(config.data.clean)),
    }
    return hash_document(choices)


def describe_template(form: ChatForm) -> int | dict[str, Any]:
    """What of a template decides the tokens; ChatML in which all of a reply trains is told by its version alone."""
    if form.source == "" and form.thinking is Thinking.train:
        return TEMPLATE_VERSION
    return {"version": TEMPLATE_VERSION, "source": form.source, "thinking": form.thinking.name}


def build_folder(
    config: RunConfig,
    base: Base,
    locations: dict[str, Location],
    folder: Path,
    fingerprint: str,
    progress: ReportProgress,
) -> None:
    """Build into a staging folder and rename it when every byte is on the disk."""
    kept_rejections = folder.with_name(f"{folder.name}.rejected.jsonl")
    with stage(folder, replace=True) as staging:
        try:
            description = build_cache(config, locations, base.path, staging, kept_rejections, progress)
        except DataError:
            if (staging / "rejected.jsonl").is_file():
                (staging / "rejected.jsonl").replace(kept_rejections)
            raise
        write_json(staging / "summary.json", description.pop("summary"))
        digests = digest_files(list_files(staging))
        description |= {
            "fingerprint": fingerprint,
            "files": {
                file.relative_to(staging).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
                for file, digest in digests.items()
            },
        }
        write_durably(staging / MANIFEST, seal_document(description))
    kept_rejections.unlink(missing_ok=True)


def list_files(folder: Path) -> list[Path]:
    """Every file under `folder`."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


def find_damage(folder: Path, verify: bool, progress: ReportProgress) -> str:
    """What is wrong with the cache in `folder`, in a few words; empty where it is as it was written.

    Sizes are always compared; with `verify` every byte is read.
    """
    manifest = read_sealed(folder / MANIFEST)
    if manifest is None:
        return f"{MANIFEST} is missing or not as it was written"
    files = {folder / name: entry for name, entry in manifest["files"].items()}
    for file, entry in files.items():
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            return f"{file.relative_to(folder)} is missing or cut short"
    if verify:
        total = sum(entry["bytes"] for entry in files.values())
        digests = digest_files(files, lambda done: progress("checking", done, total))
        for file, entry in files.items():
            if digests[file] != entry["sha256"]:
                return f"{file.relative_to(folder)} is not as it was written"
    return ""


def ignore_progress(part: str, done: int, total: int | None) -> None:
    """Shows nothing."""
