"""Pages of a MediaWiki XML dump, parsed while it is decompressed."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import IO

from cqlora.data.records import RawRow
from cqlora.data.sources.files import UnreadableRowError, first_line, open_stream
from cqlora.data.sources.location import SourceFile
from cqlora.errors import DataError


def read_dump(file: SourceFile) -> Iterator[RawRow]:
    """One row a page: `{title, namespace, redirect, wikitext}`; the line is the page's number in the dump.

    A file in an encoding that Python does not know gives one UnreadableRowError.

    Raises:
        DataError: the XML is broken or cut short, with the place.
    """
    number = 0
    with open_stream(file.path) as stream:
        try:
            for page in read_pages(stream):
                number += 1
                yield RawRow(file.path.name, number, page, file.split)
        except ElementTree.ParseError as error:
            raise DataError(
                f"{file.path} is broken XML after page {number} ({first_line(error)}); fetch it again."
            ) from None
        except (LookupError, ValueError) as error:
            whole = UnreadableRowError(f"whole file unread: {first_line(error)}")
            yield RawRow(file.path.name, number + 1, whole, file.split)


def read_pages(stream: IO[bytes]) -> Iterator[dict[str, object]]:
    """The pages of a dump, each forgotten when it has been read."""
    root = None
    for event, element in ElementTree.iterparse(stream, events=("start", "end")):
        if root is None:
            root = element
        if event == "end" and element.tag.rpartition("}")[2] == "page":
            yield {
                "title": element.findtext("{*}title") or "",
                "namespace": element.findtext("{*}ns") or "0",
                "redirect": element.find("{*}redirect") is not None,
                "wikitext": element.findtext("{*}revision/{*}text") or "",
            }
            root.clear()
