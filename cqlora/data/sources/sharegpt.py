"""ShareGPT: `{id, conversations: [{from, value}, …]}`, as people exported them."""

import html
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cqlora.config import SourceConfig
from cqlora.data.records import Conversation, Record, RowError, Turn
from cqlora.data.sources.fields import kind_of, turn_of
from cqlora.data.sources.turns import close_conversation, drop_leading_answers, join_repeated_roles

_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard", "model", "bot", "claude"), "assistant"),
    "system": "system",
}
_TEXT_FIELDS = ("value", "text", "content", "markdown")


def parse_sharegpt(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """One conversation, mended by rules that are counted.

    HTML entities are resolved; empty turns, answers before the first question and questions after the
    last answer are cut; turns of one role in a row are joined.
    """
    if not isinstance(row, dict):
        raise RowError(f"row is {kind_of(row)}, not an object")
    messages = row.get("conversations", row.get("conversation", row.get("items")))
    if not isinstance(messages, list):
        raise RowError("missing field conversations")
    yield mend_conversation(messages, counts)


def mend_conversation(messages: list[Any], counts: Counter[str]) -> Conversation:
    """The conversation of `{from, value}` messages after all rules.

    Raises:
        RowError: an unknown role, a missing field, or nothing left.
    """
    spoken = [message for message in messages if not is_empty(message)]
    if len(spoken) < len(messages):
        counts["empty turns cut"] += 1
    role_fields = ["role" if isinstance(message, dict) and "from" not in message else "from" for message in spoken]
    turns = [turn_of(message, field, _TEXT_FIELDS, _ROLES) for message, field in zip(spoken, role_fields, strict=True)]
    plain = [Turn(turn.role, html.unescape(turn.text)) for turn in turns]
    if plain != turns:
        counts["html unescaped"] += 1
    plain = drop_leading_answers(plain, counts)
    return close_conversation(join_repeated_roles(plain, counts), counts)


def is_empty(message: Any) -> bool:
    """Whether a message has a text field and no words in it."""
    if not isinstance(message, dict):
        return False
    texts = [message[name] for name in _TEXT_FIELDS if name in message]
    return bool(texts) and isinstance(texts[0], str) and not texts[0].strip()
