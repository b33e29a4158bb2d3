"""Plain text: whole files, parts of files between separators, or rows with a `text` field."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from cqlora.config.schema import SourceConfig
from cqlora.data.records import Document, Record
from cqlora.data.sources.fields import count_unused, text_field


def parse_text(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """One document."""
    text = text_field(row, "text", "content").strip()
    count_unused(row, ("text" if "text" in row else "content",), counts)
    yield Document(text)
