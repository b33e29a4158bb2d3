"""One reader per kind of source: its files give rows, its parser makes rows into records."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from cqlora.config.choices import SourceKind
from cqlora.config.schema import SourceConfig
from cqlora.data.records import RawRow, Record
from cqlora.data.sources import files
from cqlora.data.sources.alpaca import parse_alpaca
from cqlora.data.sources.belle import parse_belle
from cqlora.data.sources.dialog import parse_dialog
from cqlora.data.sources.dump import read_dump
from cqlora.data.sources.hub import read_dataset
from cqlora.data.sources.llama_factory import parse_described
from cqlora.data.sources.location import (
    DELIMITERS,
    MODELSCOPE,
    SAMPLE_DIR,
    Location,
    SourceFile,
    find_sources,
    format_of,
)
from cqlora.data.sources.messages import parse_messages
from cqlora.data.sources.modelscope import read_modelscope
from cqlora.data.sources.oasst1 import group_messages, parse_oasst1
from cqlora.data.sources.preference import parse_preference
from cqlora.data.sources.recognition import name_kind
from cqlora.data.sources.sharegpt import parse_sharegpt
from cqlora.data.sources.text import parse_text
from cqlora.data.sources.wiki import parse_wiki

__all__ = ["PARSERS", "SAMPLE_DIR", "find_sources", "read_rows"]

Parser = Callable[[Any, SourceConfig, Counter[str]], Iterator[Record]]

PARSERS: dict[SourceKind, Parser] = {
    SourceKind.wiki: parse_wiki,
    SourceKind.text: parse_text,
    SourceKind.dialog: parse_dialog,
    SourceKind.messages: parse_messages,
    SourceKind.oasst1: parse_oasst1,
    SourceKind.sharegpt: parse_sharegpt,
    SourceKind.belle: parse_belle,
    SourceKind.alpaca: parse_alpaca,
    SourceKind.preference: parse_preference,
    SourceKind.llama_factory: parse_described,
}


def parse_recognised(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """The row by the reader of the kind that its fields name, and a count that says which."""
    kind = name_kind(row)
    records = list(PARSERS[kind](row, source, counts))
    counts[f"rows taken for {kind.value}"] += 1
    yield from records


PARSERS[SourceKind.auto] = parse_recognised


def read_rows(location: Location, source: SourceConfig) -> Iterator[RawRow]:
    """All rows of a source, file after file, not yet parsed."""
    rows = read_places(location, source)
    if location.entry is not None:
        return (row._replace(body={"entry": location.entry, "row": row.body}) for row in rows)
    return group_messages(rows) if source.kind is SourceKind.oasst1 else rows


def read_places(location: Location, source: SourceConfig) -> Iterator[RawRow]:
    """The rows of the dataset, or of every file."""
    if location.dataset.startswith(MODELSCOPE):
        yield from read_modelscope(location, source, read_file)
    elif location.dataset:
        yield from read_dataset(location)
    for file in location.files:
        yield from read_file(file, source)


def read_file(file: SourceFile, source: SourceConfig) -> Iterator[RawRow]:
    """The rows of one file, by its suffix."""
    match format_of(file.path):
        case ".parquet":
            return files.read_parquet(file)
        case ".jsonl":
            return files.read_json_lines(file)
        case ".json":
            return files.read_json(file, rows_are_lists=source.kind is SourceKind.dialog)
        case ".xml":
            return read_dump(file)
        case table if table in DELIMITERS:
            return files.read_table(file, DELIMITERS[table])
    # LLaMA-Factory takes every line of a text file for a document.
    lines = source.kind is SourceKind.llama_factory
    return files.read_text(file, "\n" if lines else source.separator)
