"""ShareGPT: `{id, conversations: [{from, value}, …]}`, as people exported them."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from cqlora.config.schema import SourceConfig
from cqlora.data.records import Conversation, Record, RowError, Turn
from cqlora.data.sources.fields import count_unused, count_unused_of_messages, kind_of, optional_text, turn_of, unescape
from cqlora.data.sources.tools import read_calls, read_tools
from cqlora.data.sources.turns import close_conversation, drop_leading_answers, join_repeated_roles, put_system

_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard", "model", "bot", "claude"), "assistant"),
    "system": "system",
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "tool_response", "function_response"), "tool"),
}
_CALLING = ("function_call", "tool_call")
_MESSAGE_FIELDS = ("conversations", "conversation", "items")
_TEXT_FIELDS = ("value", "text", "content", "markdown")


def parse_sharegpt(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """One conversation, mended by rules that are counted.

    A `system` field is the system message, `tools` are the tools of `function_call` turns, whose results are
    `observation` turns. HTML entities are resolved; empty turns, answers before the first
    question and questions after the last answer are cut; turns of one role in a row are joined.
    """
    if not isinstance(row, dict):
        raise RowError(f"row is {kind_of(row)}, not an object")
    field = next((name for name in _MESSAGE_FIELDS if name in row), _MESSAGE_FIELDS[0])
    yield mend_conversation(row, field, counts)


def mend_conversation(row: dict[str, Any], field: str, counts: Counter[str]) -> Conversation:
    """The conversation of the `{from, value}` messages in a row's field, after all rules.

    Raises:
        RowError: an unknown role, a missing field, or nothing left.
    """
    turns = read_turns(row.get(field), field, counts)
    count_unused(row, (field, "system", "tools"), counts)
    turns = put_system(optional_text(row, "system"), turns, counts)
    plain = [turn._replace(text=unescape(turn.text)) for turn in turns]
    if plain != turns:
        counts["html unescaped"] += 1
    plain = drop_leading_answers(plain, counts)
    return close_conversation(join_repeated_roles(plain, counts), counts, read_tools(row.get("tools")))


def read_turns(messages: Any, field: str, counts: Counter[str]) -> list[Turn]:
    """The turns of the `{from, value}` or `{role, content}` messages of a field; those without words are cut.

    Raises:
        RowError: the field is no list, or a message is of another shape.
    """
    if not isinstance(messages, list):
        raise RowError(f"missing field {field}")
    spoken = [message for message in messages if not is_empty(message)]
    if len(spoken) < len(messages):
        counts["empty turns cut"] += 1
    turns = [read_turn(message) for message in spoken]
    count_unused_of_messages(spoken, ("from", "role", *_TEXT_FIELDS), counts)
    return turns


def read_turn(message: Any) -> Turn:
    """One message; a call of a tool is a reply without words.

    Raises:
        RowError: see read_turns, or a call that is none.
    """
    turn = turn_of(message, role_field(message), _TEXT_FIELDS, _ROLES)
    calls = message[role_field(message)].strip().lower() in _CALLING
    return Turn("assistant", "", read_calls(turn.text)) if calls else turn


def role_field(message: Any) -> str:
    """The field that says who speaks."""
    return "role" if isinstance(message, dict) and "from" not in message else "from"


def is_empty(message: Any) -> bool:
    """Whether a message has a text field and no words in it."""
    if not isinstance(message, dict):
        return False
    texts = [message[name] for name in _TEXT_FIELDS if name in message]
    return bool(texts) and isinstance(texts[0], str) and not texts[0].strip()
