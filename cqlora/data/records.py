"""What flows from the sources to the encoder: a document or a conversation."""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SPLITS = ("train", "val", "test")
ROLES = ("system", "user", "assistant")


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


@dataclass(slots=True)
class Document:
    """Raw text, trained whole."""

    text: str


@dataclass(slots=True)
class Conversation:
    """Messages of system, user and assistant, in order."""

    turns: list[Turn]
    family: str = field(default="", compare=False)
    """What conversations that share words have in common, such as the prompt of their tree: they are trained or held
    out together. Empty: the conversation stands by itself."""


Record = Document | Conversation


class RowError(Exception):
    """A row that cannot be read; the message is the reason, short enough to be counted by."""


class RowDropped(Exception):
    """A row that can be read and that a rule leaves out; the message is the rule."""


def text_of(record: Record) -> str:
    """All the words of a record."""
    if isinstance(record, Document):
        return record.text
    return "\n".join(turn.text for turn in record.turns)


def dump_record(record: Record) -> bytes:
    """A record as it lies in a spool file: a document's own bytes, a conversation as JSON."""
    if isinstance(record, Document):
        return b"D" + record.text.encode()
    return b"C" + json.dumps(record.turns, ensure_ascii=False).encode()


def load_record(data: bytes) -> Record:
    """The record that dump_record wrote."""
    if data[:1] == b"D":
        return Document(data[1:].decode())
    return Conversation([Turn(*turn) for turn in json.loads(data[1:])])
