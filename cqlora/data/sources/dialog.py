"""Dialogs: one JSON list of `{role, text}` a line; a list of one message is raw text."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from cqlora.config.schema import SourceConfig
from cqlora.data.records import Document, Record, RowError
from cqlora.data.sources.fields import PLAIN_ROLES, count_unused_of_messages, kind_of, text_field, turn_of
from cqlora.data.sources.turns import close_conversation


def parse_dialog(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """One conversation, or one document where the list holds a single message."""
    if not isinstance(row, list):
        raise RowError(f"row is {kind_of(row)}, not a list")
    count_unused_of_messages(row, ("role", "text", "content"), counts)
    if len(row) == 1:
        yield Document(text_field(row[0], "text", "content").strip())
        return
    turns = [turn_of(message, "role", ("text", "content"), PLAIN_ROLES) for message in row]
    yield close_conversation(turns, counts)
