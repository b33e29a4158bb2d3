"""Rows of a ModelScope dataset: its files are fetched one at a time, read as files here are, and removed again.

By the hub's own addresses (modelscope_hub, _legacy_api.py): its Python package asks for an older `datasets` than this
project uses.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

from cqlora.config.schema import SourceConfig
from cqlora.data.records import RawRow
from cqlora.data.sources.files import first_line
from cqlora.data.sources.hub import hub_of, nowhere
from cqlora.data.sources.location import MODELSCOPE, Location, SourceFile, assign_splits, is_read
from cqlora.errors import DataError

SECONDS = 60.0
"""In which the hub must go on answering."""
PAGE = 200
_MOST_BYTES = 64 << 20
"""Of a page that lists files."""
_MOST_FILES = 1_000_000
ReadFile = Callable[[SourceFile, SourceConfig], Iterator[RawRow]]


def read_modelscope(location: Location, source: SourceConfig, read_file: ReadFile) -> Iterator[RawRow]:
    """Rows of every file of the dataset that the kind of source reads; `subset` is a folder of its repository.

    Raises:
        DataError: the hub cannot be reached or breaks off, or the dataset has no such file.
    """
    try:
        listed = list_blobs(location)
    except (OSError, ValueError) as error:
        raise nowhere(location, first_line(error)) from None
    for path, size, split in choose_files(location, source, listed):
        with tempfile.TemporaryDirectory(prefix="cqlora-") as folder:
            file = Path(folder) / Path(path).name
            try:
                download(location, path, file, size)
            except (OSError, ValueError) as error:
                raise nowhere(location, f"{path}: {first_line(error)}") from None
            for row in read_file(SourceFile(file, split), source):
                yield row._replace(file=f"{location.dataset}/{path}")


def repository(location: Location) -> str:
    """Address of the dataset's repository."""
    return f"{hub_of(location).rstrip('/')}/api/v1/datasets/{location.dataset.removeprefix(MODELSCOPE)}/repo"


def list_blobs(location: Location) -> list[dict[str, Any]]:
    """Every file of the repository, page after page.

    Raises:
        OSError, ValueError: the hub does not answer, or not with such a list.
    """
    found: list[dict[str, Any]] = []
    while len(found) < _MOST_FILES:
        query = {"Revision": "master", "Recursive": "True", "PageNumber": len(found) // PAGE + 1, "PageSize": PAGE}
        with urlopen(f"{repository(location)}/tree?{urlencode(query)}", timeout=SECONDS) as answer:
            page = read_page(answer.read(_MOST_BYTES + 1))
        found += page
        if len(page) < PAGE:
            return [each for each in found if each.get("Type") != "tree"]
    raise ValueError(f"it lists more than {_MOST_FILES:,} files")


def read_page(answer: bytes) -> list[dict[str, Any]]:
    """The files of one page.

    Raises:
        ValueError: it is not a hub's.
    """
    if len(answer) > _MOST_BYTES:
        raise ValueError(f"its list of files has more than {_MOST_BYTES >> 20} MiB")
    document = json.loads(answer)
    data = (document.get("Data") or {}) if isinstance(document, dict) else None
    page = (data.get("Files") or []) if isinstance(data, dict) else data
    if not isinstance(page, list) or not all(isinstance(each, dict) and each.get("Path") for each in page):
        raise ValueError("its answer is no list of files")
    return page


def choose_files(
    location: Location, source: SourceConfig, listed: list[dict[str, Any]]
) -> list[tuple[str, int | None, str | None]]:
    """Path, size and split of the files to read; without names of held-out splits a hash of the document decides."""
    inside = f"{location.subset.strip('/')}/" if location.subset else ""
    paths = {str(each["Path"]): each.get("Size") for each in listed if str(each["Path"]).startswith(inside)}
    paths = {path: size for path, size in paths.items() if is_read(Path(path), source.kind) and path[0] != "."}
    if not paths:
        raise DataError(
            f"{location.dataset} has no file in {inside or 'it'} that kind={source.kind.value} reads; its files are "
            f"{', '.join(str(each['Path']) for each in listed[:8]) or 'none'}."
        )
    splits = assign_splits(list(map(Path, sorted(paths))))
    return [(str(path), paths[str(path)], split) for path, split in splits]


def download(location: Location, path: str, file: Path, size: int | None) -> None:
    """Fetch a file of the repository, which has so many bytes.

    Raises:
        OSError, ValueError: it is another, or breaks off.
    """
    query = urlencode({"Revision": "master", "FilePath": path})
    with urlopen(f"{repository(location)}?{query}", timeout=SECONDS) as answer, file.open("wb") as stream:
        fetched = 0
        while block := answer.read(1 << 20):
            stream.write(block)
            fetched += len(block)
            if size is not None and fetched > size:
                raise ValueError(f"it goes on after its {size} bytes")
    if size is not None and fetched != size:
        raise ValueError(f"it ends after {fetched} of {size} bytes")
