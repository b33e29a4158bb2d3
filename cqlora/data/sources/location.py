"""Where a source is found: its path, a file or folder under the data root by its name, its dataset."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from cqlora.config import DataConfig, SourceConfig
from cqlora.errors import DataError

SAMPLE_DIR = Path(__file__).parent.parent / "sample"
"""Text written for this project, which `data=sample` reads."""


COMPRESSIONS = ("", ".gz", ".bz2", ".xz", ".zst")
FORMATS = (".jsonl", ".json", ".parquet", ".txt", ".md", ".xml")
SUFFIXES = tuple(kind + compression for kind in FORMATS for compression in COMPRESSIONS)

_SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source and the split that its name declares."""

    path: Path
    split: str | None


@dataclass(frozen=True, slots=True)
class Location:
    """Files on disk, or a Hugging Face dataset where there are none."""

    files: list[SourceFile] = field(default_factory=list)
    dataset: str = ""
    subset: str = ""


def find_sources(data: DataConfig, stage: str) -> dict[str, Location]:
    """Where each source of a stage lies.

    Raises:
        DataError: a source is nowhere to be found.
    """
    return {
        name: locate_source(name, source, data.root) for name, source in data.sources.items() if stage in source.stages
    }


def locate_source(name: str, source: SourceConfig, root: str) -> Location:
    """Find a source, never another one in its place.

    Raises:
        DataError: the source is in none of the three places, or a named place is empty.
    """
    if source.path:
        return Location(files=list_files(Path(source.path), f"data.sources.{name}.path"))
    folder = Path(root) if root else SAMPLE_DIR
    found = find_by_name(folder, name)
    if found is not None:
        return Location(files=list_files(found, f"source {name}"))
    if source.dataset:
        return Location(dataset=source.dataset, subset=source.subset)
    place = f"{root}/{name} (folder, or file with {', '.join(FORMATS)})" if root else "data.root (it is empty)"
    raise DataError(
        f"source {name} is not found: data.sources.{name}.path is empty, nothing lies at {place}, and "
        f"data.sources.{name}.dataset is empty; set one of the three, e.g. data.root=FOLDER."
    )


def find_by_name(folder: Path, name: str) -> Path | None:
    """The folder `name`, or the one file `name.SUFFIX`, under `folder`.

    Raises:
        DataError: several files bear the name.
    """
    if (folder / name).is_dir():
        return folder / name
    files = [folder / (name + suffix) for suffix in SUFFIXES if (folder / (name + suffix)).is_file()]
    if len(files) > 1:
        raise DataError(
            f"source {name} is found twice, as {files[0]} and {files[1]}; name one by data.sources.{name}.path."
        )
    return files[0] if files else None


def list_files(path: Path, what: str) -> list[SourceFile]:
    """The files of a path in the order of their names, each with the split its name declares.

    Raises:
        DataError: there is nothing at `path`, or no file of a known format in it.
    """
    if path.is_file():
        return [SourceFile(path, None)]
    if not path.is_dir():
        raise DataError(f"{what}={path} does not exist; give a file or a folder.")
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
    if not files:
        raise DataError(f"{what}={path} holds no file with {', '.join(FORMATS)}, compressed or not.")
    splits = [split_of(file) for file in files]
    if "train" not in splits:
        return [SourceFile(file, None) for file in files]
    held_out = any(split in ("val", "test") for split in splits)
    return [
        SourceFile(file, split if held_out else None)
        for file, split in zip(files, splits, strict=True)
        if split is not None
    ]


def split_of(file: Path) -> str | None:
    """The split named by a file such as `val.jsonl` or `train-00001-of-00041.parquet`."""
    return _SPLIT_NAMES.get(re.split(r"[-_.]", file.name, maxsplit=1)[0].lower())
