"""Records to pieces of at most `sequence_length` tokens, with their label masks and the text they cover."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cqlora.data.chat import ChatEncoder, EncodedTurn
from cqlora.data.language import han_characters
from cqlora.data.records import Conversation, Document, Record, Turn, load_record, text_of
from cqlora.data.tokenizer import PlainTokenizer, TextTokens

MEASURED_CHARACTERS = 4096


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """Everything that decides how a record becomes tokens."""

    folder: str
    """The base's folder, for its tokenizer."""
    sequence_length: int
    all_tokens: bool
    """Every token of a conversation is a label (pretraining), not the assistant's alone."""
    system_prompt: str = ""
    """Put first where a conversation brings no system message."""


@dataclass(slots=True)
class EncodedBatch:
    """Pieces of several records, one after another."""

    tokens: np.ndarray
    """uint16 or uint32 (tokens,)."""
    labels: np.ndarray
    """uint8 (tokens,): 1 where the token is predicted and counted."""
    lengths: np.ndarray
    """uint32 (pieces,): tokens of each piece."""
    label_tokens: np.ndarray
    """uint32 (pieces,)."""
    characters: np.ndarray
    """uint32 (pieces,): characters of the text under a piece's labels."""
    utf8_bytes: np.ndarray
    """uint32 (pieces,)."""
    records: np.ndarray
    """uint32 (pieces,): which record of the batch a piece is cut from."""
    counts: Counter[str]
    han_tokens: int
    """Tokens that cover a Han character, in the records that were measured."""
    han_characters: int


@dataclass(slots=True)
class Pieces:
    """Grows while a batch is encoded."""

    tokens: list[Sequence[int] | np.ndarray] = field(default_factory=list)
    labels: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list)
    label_tokens: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    utf8_bytes: list[int] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(
        self, record: int, ids: Sequence[int] | np.ndarray, labels: bytes, characters: int, utf8_bytes: int
    ) -> None:
        """One piece; its first token has nothing before it and is never a label."""
        label_tokens = labels.count(1)
        if labels[0]:
            raise AssertionError("a piece's first token cannot be a label")
        if not label_tokens:
            self.counts["pieces without a label left out"] += 1
            return
        self.tokens.append(ids)
        self.labels.extend(labels)
        self.lengths.append(len(ids))
        self.label_tokens.append(label_tokens)
        self.characters.append(characters)
        self.utf8_bytes.append(utf8_bytes)
        self.records.append(record)


def cut_points(tokens: int, capacity: int) -> list[tuple[int, int]]:
    """Consecutive (start, end) of at most `capacity` tokens; none of one token, which could train nothing."""
    cuts = list(range(0, tokens, capacity))
    if len(cuts) > 1 and tokens - cuts[-1] == 1 and capacity > 1:
        cuts[-1] -= 1
    return list(zip(cuts, [*cuts[1:], tokens], strict=True))


class RecordEncoder:
    """Encodes records for one tokenizer, stage and length."""

    def __init__(self, settings: EncodeSettings) -> None:
        self.settings = settings
        self.tokenizer = PlainTokenizer(Path(settings.folder))
        self.special = self.tokenizer.special
        self.capacity = settings.sequence_length
        self._chat: ChatEncoder | None = None

    @property
    def chat(self) -> ChatEncoder:
        """The template's encoder, made when a first conversation asks for it."""
        if self._chat is None:
            self._chat = ChatEncoder(self.tokenizer)
        return self._chat

    def encode(self, records: Sequence[Record], measured: int = 0, in_bulk: bool = False) -> EncodedBatch:
        """All pieces of `records` in order; tokens per Han character are measured on the first `measured`."""
        pieces = Pieces()
        documents = [record.text for record in records if isinstance(record, Document)]
        encoded_documents = iter(self.tokenizer.encode_texts(documents, in_bulk))
        conversations = [self.turns_of(record) for record in records if isinstance(record, Conversation)]
        encoded_conversations = self.encode_conversations(conversations, in_bulk)
        for index, record in enumerate(records):
            if isinstance(record, Document):
                self.add_document(pieces, index, record.text, next(encoded_documents))
            else:
                self.add_conversation(pieces, index, next(encoded_conversations))
        han = [self.measure_han(record) for record in records[:measured]]
        return EncodedBatch(
            tokens=join_tokens(pieces.tokens, self.tokenizer.dtype),
            labels=np.frombuffer(bytes(pieces.labels), dtype=np.uint8),
            lengths=np.array(pieces.lengths, dtype=np.uint32),
            label_tokens=np.array(pieces.label_tokens, dtype=np.uint32),
            characters=np.array(pieces.characters, dtype=np.uint32),
            utf8_bytes=np.array(pieces.utf8_bytes, dtype=np.uint32),
            records=np.array(pieces.records, dtype=np.uint32),
            counts=pieces.counts,
            han_tokens=sum(tokens for tokens, _ in han),
            han_characters=sum(characters for _, characters in han),
        )

    def add_document(self, pieces: Pieces, record: int, text: str, tokens: TextTokens) -> None:
        """Start token, words, end token, cut into consecutive pieces where they are too many.

        The first token of a piece is context only; its characters count for nobody.
        """
        ids = np.concatenate([[self.special.document_start], tokens.ids, [self.special.document_end]])
        if len(ids) <= self.capacity:
            pieces.add(record, ids, b"\0" + b"\1" * (len(ids) - 1), len(text), len(text.encode()))
            return
        pieces.counts["documents cut"] += 1
        for start, end in cut_points(len(ids), self.capacity):
            first, last = (text_end(tokens, text, token - 1) for token in (start, end - 1))
            labels = b"\0" + b"\1" * (end - start - 1)
            pieces.add(record, ids[start:end], labels, last - first, len(text[first:last].encode()))

    def add_cut(
        self,
        pieces: Pieces,
        record: int,
        ids: list[int],
        labels: bytes,
        characters: list[int],
        utf8_bytes: list[int],
    ) -> None:
        """Consecutive pieces of turns too long for one; the first token of each is context only."""
        for start, end in cut_points(len(ids), self.capacity):
            piece_labels = b"\0" + labels[start + 1 : end]
            covered = [index for index, label in enumerate(piece_labels, start) if label]
            pieces.add(
                record,
                ids[start:end],
                piece_labels,
                sum(characters[index] for index in covered),
                sum(utf8_bytes[index] for index in covered),
            )

    def turns_of(self, record: Conversation) -> list[Turn]:
        """The conversation's turns, the stage's system prompt first where it brings none."""
        if self.settings.system_prompt and record.turns[0].role != "system":
            return [Turn("system", self.settings.system_prompt), *record.turns]
        return record.turns

    def encode_conversations(self, conversations: list[list[Turn]], in_bulk: bool) -> Iterator[list[EncodedTurn]]:
        """The encoded turns of each conversation, all encoded in one batch."""
        if not conversations:
            return
        turns = [turn for conversation in conversations for turn in conversation]
        encoded = self.chat.encode_turns(turns, self.settings.all_tokens, in_bulk)
        start = 0
        for conversation in conversations:
            yield encoded[start : start + len(conversation)]
            start += len(conversation)

    def add_conversation(self, pieces: Pieces, record: int, turns: list[EncodedTurn]) -> None:
        """One piece, or, where it is too long, several that each begin at a user's turn.

        Every piece opens as the conversation did, with the beginning token and the system message. An
        exchange that is too long by itself is cut like a document.
        """
        start = [self.special.document_start] if self.settings.all_tokens else self.chat.bos
        system = turns[:1] if turns[0].turn.role == "system" else []
        exchanges = split_exchanges(turns[len(system) :])
        opening = len(start) + sum(len(turn.ids) for turn in system)
        groups = group_exchanges(exchanges, self.capacity - opening - int(self.settings.all_tokens))
        if len(groups) > 1:
            pieces.counts["conversations cut between turns"] += 1
        for number, group in enumerate(groups, start=1):
            ends = self.settings.all_tokens and number == len(groups)
            self.add_turns(pieces, record, start, system + group, [self.special.document_end] if ends else [])

    def add_turns(
        self, pieces: Pieces, record: int, start: list[int], turns: list[EncodedTurn], end: list[int]
    ) -> None:
        """Turns between a start and an end token, as one piece where they fit."""
        ids = [*start, *(token for turn in turns for token in turn.ids), *end]
        all_labels = b"\1" * len(start) + b"".join(turn.labels for turn in turns) + b"\1" * len(end)
        labels = b"\0" + all_labels[1:]
        if len(ids) <= self.capacity:
            characters = sum(turn.characters for turn in turns)
            pieces.add(record, ids, labels, characters, sum(turn.utf8_bytes for turn in turns))
            return
        pieces.counts["exchanges cut"] += 1
        counted = [self.chat.count_characters(turn) for turn in turns]
        characters_of = [*[0] * len(start), *(n for turn, _ in counted for n in turn), *[0] * len(end)]
        bytes_of = [*[0] * len(start), *(n for _, turn in counted for n in turn), *[0] * len(end)]
        self.add_cut(pieces, record, ids, labels, characters_of, bytes_of)

    def measure_han(self, record: Record) -> tuple[int, int]:
        """Tokens that cover a Han character, and Han characters, in the record's first characters."""
        text = text_of(record)[:MEASURED_CHARACTERS]
        han = np.concatenate([[0], np.cumsum(han_characters(text))])
        if not han[-1]:
            return 0, 0
        offsets = self.tokenizer.text.encode(text, add_special_tokens=False).offsets
        spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        return int((han[spans[:, 1]] > han[spans[:, 0]]).sum()), int(han[-1])


def text_end(tokens: TextTokens, text: str, token: int) -> int:
    """Where in `text` its token ends: 0 before the first, the text's own end from the last on."""
    if token < 0:
        return 0
    return tokens.end_of(text, token) if token < len(tokens.ids) - 1 else len(text)


def join_tokens(pieces: list[Sequence[int] | np.ndarray], dtype: np.dtype[Any]) -> np.ndarray:
    """One array of all pieces' ids."""
    arrays = [np.asarray(piece, dtype=dtype) for piece in pieces]
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)


def split_exchanges(turns: list[EncodedTurn]) -> list[list[EncodedTurn]]:
    """Turns grouped so that each group but the first begins where a user speaks after an assistant."""
    groups: list[list[EncodedTurn]] = []
    for turn in turns:
        if not groups or (turn.turn.role != "assistant" and groups[-1][-1].turn.role == "assistant"):
            groups.append([])
        groups[-1].append(turn)
    return groups


def group_exchanges(exchanges: list[list[EncodedTurn]], room: int) -> list[list[EncodedTurn]]:
    """Consecutive exchanges joined while they fit into `room` tokens; a longer one stands alone."""
    groups: list[list[EncodedTurn]] = []
    left = 0
    for exchange in exchanges:
        tokens = sum(len(turn.ids) for turn in exchange)
        if not groups or tokens > left:
            groups.append([])
            left = room
        groups[-1] += exchange
        left -= tokens
    return groups


@lru_cache(maxsize=1)
def load_encoder(settings: EncodeSettings) -> RecordEncoder:
    """The encoder of these settings, made once per process."""
    return RecordEncoder(settings)


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """Records that lie one after another, or anywhere, in a spool file."""

    spool: str
    offsets: np.ndarray
    lengths: np.ndarray
    measured: int
    in_bulk: bool
    """Whether there is so much to encode that the faster encoder is worth its start."""


def encode_task(settings: EncodeSettings, task: EncodeTask) -> EncodedBatch:
    """Read a task's records and encode them."""
    with open(task.spool, "rb") as stream:
        records = []
        for offset, length in zip(task.offsets.tolist(), task.lengths.tolist(), strict=True):
            stream.seek(offset)
            records.append(load_record(stream.read(length)))
    return load_encoder(settings).encode(records, task.measured, task.in_bulk)
