"""What flows from the sources to the encoder: a document or a conversation."""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SPLITS = ("train", "val", "test")
ROLES = ("system", "user", "assistant")
"""Who speaks where nobody calls tools; `tool` turns, which hold a call's result, are beside them."""


class RawRow(NamedTuple):
    """One row of a source as it lies in its file, not yet parsed."""

    file: str
    line: int
    body: Any
    """Bytes of a JSON line, or an object that the file's format has already decoded."""
    split: str | None
    """The split that the file is for; None where a hash of the document decides."""


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    text: str
    calls: str = ""
    """The assistant's tool calls, as a JSON list of `{name, arguments}`; empty for none."""


@dataclass(slots=True)
class Document:
    """Raw text, trained whole."""

    text: str


@dataclass(slots=True)
class Conversation:
    """Messages of system, user, assistant and tool, in order."""

    turns: list[Turn]
    family: str = field(default="", compare=False)
    """What conversations that share words have in common, such as the prompt of their tree: they are trained or held
    out together. Empty: the conversation stands by itself."""
    tools: str = ""
    """The tools that may be called, as a JSON list of `{type, function: {name, …}}`; empty for none."""

    @property
    def calls_tools(self) -> bool:
        """Whether a tool is called, or gives a result."""
        return any(turn.calls or turn.role == "tool" for turn in self.turns)


Record = Document | Conversation


class RowError(Exception):
    """A row that cannot be read; the message is the reason, short enough to be counted by."""


class RowDropped(Exception):
    """A row that can be read and that a rule leaves out; the message is the rule."""


def text_of(record: Record) -> str:
    """All the words of a record."""
    if isinstance(record, Document):
        return record.text
    return "\n".join(text for turn in record.turns for text in ([turn.text, turn.calls] if turn.calls else [turn.text]))


def dump_record(record: Record) -> bytes:
    """A record as it lies in a spool file: a document's own bytes, a conversation as JSON."""
    if isinstance(record, Document):
        return b"D" + record.text.encode()
    if record.tools or record.calls_tools:
        return b"T" + json.dumps([record.tools, record.turns], ensure_ascii=False).encode()
    return b"C" + json.dumps([turn[:2] for turn in record.turns], ensure_ascii=False).encode()


def load_record(data: bytes) -> Record:
    """The record that dump_record wrote."""
    if data[:1] == b"D":
        return Document(data[1:].decode())
    if data[:1] == b"T":
        tools, turns = json.loads(data[1:])
        return Conversation([Turn(*turn) for turn in turns], tools=tools)
    return Conversation([Turn(*turn) for turn in json.loads(data[1:])])
