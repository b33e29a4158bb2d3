"""Chat rows as most tools write them: `{messages: [{role, content}, …]}`."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from cqlora.config.schema import SourceConfig
from cqlora.data.records import Record, RowError
from cqlora.data.sources.fields import count_unused, count_unused_of_messages, kind_of, optional_text, turn_of
from cqlora.data.sources.turns import close_conversation, put_system

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def parse_messages(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """One conversation, a `system` field its system message; a content of several text parts is joined."""
    messages = row.get("messages") if isinstance(row, dict) else row
    if not isinstance(messages, list):
        raise RowError("missing field messages" if isinstance(row, dict) else f"row is {kind_of(row)}, not an object")
    turns = [turn_of(join_parts(message), "role", ("content", "text"), _ROLES) for message in messages]
    count_unused_of_messages(messages, ("role", "content", "text"), counts)
    if isinstance(row, dict):
        count_unused(row, ("messages", "system"), counts)
        turns = put_system(optional_text(row, "system"), turns, counts)
    yield close_conversation(turns, counts)


def join_parts(message: Any) -> Any:
    """The message with a list of text parts as one text.

    Raises:
        RowError: a part that is no text, such as an image.
    """
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise RowError(f"message part {kind}, not text"[:60])
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}
