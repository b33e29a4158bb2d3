"""Rows of an entry of LLaMA-Factory's dataset_info.json, read as Alpaca's, ShareGPT's, pairs or plain text."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from cqlora.config.schema import SourceConfig
from cqlora.data.records import Document, Record, RowDropped, RowError
from cqlora.data.sources.alpaca import parse_alpaca
from cqlora.data.sources.dataset_info import ALPACA, MEDIA, ROLES, SHAREGPT, Entry
from cqlora.data.sources.fields import count_unused, kind_of, optional_text, text_field
from cqlora.data.sources.files import decode_body
from cqlora.data.sources.preference import parse_preference
from cqlora.data.sources.sharegpt import read_turns
from cqlora.data.sources.tools import read_tools
from cqlora.data.sources.turns import close_conversation, drop_leading_answers, join_repeated_roles, put_system


def parse_described(described: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """The row of an entry, with its fields under the names that our readers know.

    Raises:
        RowError: the row cannot be read, or has pictures, films or sounds.
        RowDropped: its reply is marked as bad.
    """
    entry, row = described["entry"], decode_body(described["row"])
    if not isinstance(row, dict):
        raise RowError(f"row is {kind_of(row)}, not an object")
    for part in MEDIA:
        if row.get(entry.columns.get(part, part)):
            raise RowError(f"has {part}, which a model of text cannot take")
    count_unused(row, tuple(entry.columns.values()), counts)
    told = {part: row[column] for part, column in entry.columns.items() if column in row}
    for part in entry.required():
        if part not in told:
            raise RowError(f"missing field {entry.columns[part]}")
    if told.pop("kto_tag", None) is False:
        raise RowDropped("reply marked as bad (kto_tag)")
    parse = parse_alpaca_like if entry.formatting == "alpaca" else parse_turns
    yield from parse(entry, told, source, counts)


def parse_alpaca_like(
    entry: Entry, told: dict[str, Any], source: SourceConfig, counts: Counter[str]
) -> Iterator[Record]:
    """An instruction with its reply, or with the chosen of two; a prompt alone, where no reply is told of, is text."""
    row = {ALPACA.get(part, part): value for part, value in told.items()}
    if entry.ranking:
        yield from parse_preference(row, source, counts)
    elif "response" not in entry.columns:
        yield Document(text_field(row, "instruction").strip())
    else:
        yield from parse_alpaca(row, source, counts)


def parse_turns(entry: Entry, told: dict[str, Any], source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """A conversation, or one with the chosen of two replies."""
    row = {SHAREGPT.get(part, part): rename(entry, value) for part, value in told.items()}
    if entry.ranking:
        yield from parse_preference(row, source, counts)
        return
    count_unused(row, ("conversations", "system", "tools"), counts)
    turns = put_system(optional_text(row, "system"), read_turns(row.get("conversations"), "messages", counts), counts)
    turns = join_repeated_roles(drop_leading_answers(turns, counts), counts)
    yield close_conversation(turns, counts, read_tools(row.get("tools")))


def rename(entry: Entry, value: Any) -> Any:
    """A message as `{from, value}`, its role by ShareGPT's name; a list of them so too; anything else as it is."""
    if isinstance(value, list):
        return [rename(entry, each) for each in value]
    if not isinstance(value, dict):
        return value
    role, content = entry.tags["role_tag"], entry.tags["content_tag"]
    roles = {entry.tags[tag]: name for tag, name in ROLES.items()}
    message = {key: each for key, each in value.items() if key not in (role, content, "from", "value")}
    if role in value:
        message["from"] = roles.get(value[role], value[role]) if isinstance(value[role], str) else value[role]
    return message | ({"value": value[content]} if content in value else {})
