"""Chat rows as most tools write them: `{messages: [{role, content}, …]}`."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from cqlora.config.schema import SourceConfig
from cqlora.data.records import Record, RowError, Turn
from cqlora.data.sources.fields import count_unused, count_unused_of_messages, kind_of, optional_text, turn_of
from cqlora.data.sources.tools import read_calls, read_tools
from cqlora.data.sources.turns import close_conversation, put_system

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
}
_FIELDS = ("role", "content", "text")
_CALL_FIELDS = ("tool_calls", "function_call")


def parse_messages(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """One conversation, a `system` field its system message; a content of several text parts is joined.

    An assistant's `tool_calls` are calls of the row's `tools`, whose results are turns of the role `tool`.
    """
    messages = row.get("messages") if isinstance(row, dict) else row
    if not isinstance(messages, list):
        raise RowError("missing field messages" if isinstance(row, dict) else f"row is {kind_of(row)}, not an object")
    turns = [read_turn(join_parts(message)) for message in messages]
    count_unused_of_messages(messages, (*_FIELDS, *_CALL_FIELDS, "tool_call_id"), counts)
    tools = ""
    if isinstance(row, dict):
        count_unused(row, ("messages", "system", "tools"), counts)
        turns = put_system(optional_text(row, "system"), turns, counts)
        tools = read_tools(row.get("tools"))
    yield close_conversation(turns, counts, tools)


def read_turn(message: Any) -> Turn:
    """One message; a reply that calls tools need not have words.

    Raises:
        RowError: a missing field or an unknown role, or a call that is none.
    """
    given = [message[name] for name in _CALL_FIELDS if message.get(name)] if isinstance(message, dict) else []
    if not given:
        return turn_of(message, "role", ("content", "text"), _ROLES)
    calls, words = read_calls(given[0]), message.get("content") or ""
    if message.get("role") != "assistant" or not isinstance(words, str):
        raise RowError("tool calls in a message that is no reply")
    return Turn("assistant", words.strip(), calls)


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
