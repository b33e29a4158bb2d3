"""Where a source is found: its path, a file or folder under the data root by its name, its dataset."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from cqlora.config.choices import SourceKind
from cqlora.config.schema import DataConfig, SourceConfig
from cqlora.data.sources.dataset_info import INFO, Entry, read_entry
from cqlora.errors import DataError

SAMPLE_DIR = Path(__file__).parent.parent / "sample"
"""Text written for this project, which `data=sample` reads."""


COMPRESSIONS = ("", ".gz", ".bz2", ".xz", ".zst")
ROW_FORMATS = (".jsonl", ".json", ".parquet")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""What stands between two cells of a table, by its suffix."""
FORMATS = (*ROW_FORMATS, *DELIMITERS, ".txt", ".md", ".xml")
SUFFIXES = tuple(kind + compression for kind in FORMATS for compression in COMPRESSIONS)

MODELSCOPE = "modelscope://"
"""Before the name of a dataset that lies on ModelScope."""
_WORKBOOKS = (".xls", ".xlsx")
_COMPANIONS = ("readme", "license", "dataset_info", "dataset_infos")
"""How names of files begin that lie beside a dataset's rows and hold none."""
_FLAT = (SourceKind.wiki, SourceKind.text, SourceKind.belle, SourceKind.alpaca, SourceKind.preference, SourceKind.auto)
"""Kinds of which a row may be flat, so that a table holds it."""

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
    """Files on disk, or a dataset of Hugging Face or ModelScope where there are none."""

    files: list[SourceFile] = field(default_factory=list)
    dataset: str = ""
    subset: str = ""
    name: str = field(default="NAME", compare=False)
    """The source's."""
    entry: Entry | None = None
    """What dataset_info.json says of the rows."""


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
    if source.kind is SourceKind.llama_factory:
        return locate_entry(name, source)
    if source.path:
        what = f"data.sources.{name}.path"
        return Location(files=list_files(Path(source.path).expanduser(), what, source.kind), name=name)
    folder = Path(root).expanduser() if root else SAMPLE_DIR
    found = find_by_name(folder, name)
    if found is not None:
        return Location(files=list_files(found, f"source {name}", source.kind), name=name)
    if source.dataset:
        return Location(dataset=source.dataset, subset=source.subset, name=name)
    place = f"{root}/{name} (folder, or file with {', '.join(FORMATS)})" if root else "data.root (it is empty)"
    raise DataError(
        f"source {name} is not found: data.sources.{name}.path is empty, nothing lies at {place}, and "
        f"data.sources.{name}.dataset is empty; set one of the three, e.g. data.root=FOLDER."
    )


def locate_entry(name: str, source: SourceConfig) -> Location:
    """What an entry of a dataset_info.json names: files beside it, or a hub's dataset.

    Raises:
        DataError: no such file or entry, or one that cannot be read here.
    """
    info = Path(source.path).expanduser()
    info = info / INFO if info.is_dir() else info
    if not (source.path and source.dataset and info.is_file()):
        raise DataError(
            f"kind=llama_factory reads an entry of a {INFO}, and data.sources.{name} has path={source.path!r}, "
            f"dataset={source.dataset!r}; give data.sources.{name}.path=FOLDER/{INFO} and "
            f"data.sources.{name}.dataset=ENTRY."
        )
    entry, said = read_entry(info, source.dataset, source)
    subset = str(said.get("subset") or "")
    for key, prefix in (("hf_hub_url", ""), ("ms_hub_url", MODELSCOPE)):
        if said.get(key):
            return Location(dataset=f"{prefix}{said[key]}", subset=subset, name=name, entry=entry)
    place, what = info.parent / str(said["file_name"]), f"entry {source.dataset} of {info}: file_name"
    return Location(files=list_files(place, what, source.kind), name=name, entry=entry)


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


def formats_of(kind: SourceKind) -> tuple[str, ...]:
    """Suffixes, but for compression, of the files that a kind of source reads in a folder."""
    if kind is SourceKind.wiki:
        return FORMATS
    if kind in (SourceKind.text, SourceKind.auto):
        return tuple(each for each in FORMATS if each != ".xml")
    if kind is SourceKind.llama_factory:
        return (*ROW_FORMATS, *DELIMITERS, ".txt")
    return (*ROW_FORMATS, *DELIMITERS) if kind in _FLAT else ROW_FORMATS


def format_of(file: Path) -> str:
    """The suffix, in small letters, of what a file holds when it is decompressed."""
    inner = file.with_suffix("") if file.suffix.lower() in COMPRESSIONS[1:] else file
    return inner.suffix.lower()


def suffixes_of(kind: SourceKind) -> tuple[str, ...]:
    """The suffixes of formats_of, compressed or not."""
    return tuple(each + more for each in formats_of(kind) for more in COMPRESSIONS)


def is_read(file: Path, kind: SourceKind) -> bool:
    """Whether the kind reads a file of a folder; auto passes over what only describes the others."""
    companion = kind in (SourceKind.auto, SourceKind.llama_factory) and file.name.lower().startswith(_COMPANIONS)
    return file.name.lower().endswith(suffixes_of(kind)) and not companion


def refuse_format(file: Path, what: str, kind: SourceKind) -> None:
    """Raise DataError for a file that holds no rows of its kind, such as a workbook; plain text may have any suffix."""
    known = file.name.lower().endswith(suffixes_of(kind))
    workbook = file.suffix.lower() in _WORKBOOKS
    if known or (kind in (SourceKind.text, SourceKind.wiki) and not workbook and ".xml" not in file.suffixes):
        return
    convert = "convert or rename it"
    if workbook or file.suffix.lower() in DELIMITERS:
        reader = "read_excel" if workbook else "read_csv"
        convert = (
            f"convert it, e.g. in Python with pandas.{reader}({file.name!r}).to_json('{file.stem}.jsonl', "
            "orient='records', lines=True, force_ascii=False)"
        )
    raise DataError(
        f"{what}={file} ends in {file.suffix or 'no suffix'}, and kind={kind.value} reads "
        f"{', '.join(formats_of(kind))}, compressed or not; {convert}."
    )


def list_files(path: Path, what: str, kind: SourceKind) -> list[SourceFile]:
    """The files of a path in the order of their names, each with the split its name declares.

    Raises:
        DataError: there is nothing at `path`, or no file of a format that the kind of source reads.
    """
    if path.is_file():
        refuse_format(path, what, kind)
        return [SourceFile(path, None)]
    if not path.is_dir():
        raise DataError(f"{what}={path} does not exist; give a file or a folder.")
    files = sorted(file for file in path.rglob("*") if file.is_file() and is_read(file, kind))
    if not files:
        formats = ", ".join(formats_of(kind))
        raise DataError(
            f"{what}={path} holds no file with {formats}, compressed or not, which is what kind={kind.value} reads; "
            "give another folder or a file."
        )
    return [SourceFile(file, split) for file, split in assign_splits(files)]


def assign_splits(files: list[Path]) -> list[tuple[Path, str | None]]:
    """Files with the splits that their names declare; those without one are left out where others train and hold out.

    None: a hash of the document decides, where no file is for training or none is held out.
    """
    splits = [split_of(file) for file in files]
    if "train" not in splits:
        return [(file, None) for file in files]
    held_out = any(split in ("val", "test") for split in splits)
    return [(file, split if held_out else None) for file, split in zip(files, splits, strict=True) if split is not None]


def split_of(file: Path) -> str | None:
    """The split named by a file such as `val.jsonl` or `train-00001-of-00041.parquet`."""
    return _SPLIT_NAMES.get(re.split(r"[-_.]", file.name, maxsplit=1)[0].lower())
