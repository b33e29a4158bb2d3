"""Records to pieces of at most `sequence_length` tokens, with their label masks and the text they cover."""

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cqlora.data.conversations import ConversationEncoder
from cqlora.data.documents import encode_documents
from cqlora.data.language import han_characters
from cqlora.data.pieces import EncodedBatch, Pieces, join_batches
from cqlora.data.records import Conversation, Document, Record, load_record, text_of
from cqlora.data.tokenizer import PlainTokenizer
from cqlora.errors import DataError

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


class RecordEncoder:
    """Encodes records for one tokenizer, stage and length."""

    def __init__(self, settings: EncodeSettings, tokenizer: PlainTokenizer | None = None) -> None:
        self.settings = settings
        self.tokenizer = tokenizer or PlainTokenizer(Path(settings.folder))

    @cached_property
    def conversations(self) -> ConversationEncoder:
        """The template's encoder, made when a first conversation asks for it."""
        settings = self.settings
        return ConversationEncoder(
            self.tokenizer, settings.sequence_length, settings.all_tokens, settings.system_prompt
        )

    def encode(self, records: Sequence[Record], measured: int = 0, in_bulk: bool = False) -> EncodedBatch:
        """All pieces of `records` in order; tokens per Han character are measured on the first `measured`."""
        documents = [number for number, record in enumerate(records) if isinstance(record, Document)]
        talks = {number: record.turns for number, record in enumerate(records) if isinstance(record, Conversation)}
        batch = Pieces().batch(self.tokenizer.dtype)
        if documents:
            texts = [text_of(records[number]) for number in documents]
            tokens = self.tokenizer.encode_texts(texts, in_bulk)
            batch = encode_documents(documents, texts, tokens, self.tokenizer.special, self.settings.sequence_length)
        if talks:
            talked = self.conversations.encode(list(talks), list(talks.values()), in_bulk)
            batch = join_batches(batch, talked) if documents else talked
        for record in records[:measured]:
            self.measure_han(batch, text_of(record)[:MEASURED_CHARACTERS], in_bulk)
        return batch

    def measure_han(self, batch: EncodedBatch, text: str, in_bulk: bool) -> None:
        """Count the tokens that cover a Han character, and Han characters, into `batch`."""
        han = han_characters(text)
        if han.any():
            batch.han_tokens += self.tokenizer.encode_texts([text], in_bulk).count_over(0, han)
            batch.han_characters += int(han.sum())


class SharedEncoder:
    """A RecordEncoder that goes to other processes through a file, which each reads once.

    Reading it takes a fraction of the time in which an encoder is built from the base's folder.
    """

    def __init__(self, encoder: RecordEncoder, file: Path, sha256: str = "") -> None:
        self.encoder = encoder
        self._file = file
        self._sha256 = sha256

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._sha256:
            content = pickle.dumps((self.encoder.settings, self.encoder.tokenizer))
            self._file.write_bytes(content)
            self._sha256 = hashlib.sha256(content).hexdigest()
        return read_encoder, (self._file, self._sha256)

    def close(self) -> None:
        """Remove the file."""
        self._file.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def read_encoder(file: Path, sha256: str) -> SharedEncoder:
    """The encoder that the process which started this one wrote; one is held.

    Raises:
        DataError: the file holds something else, which is not unpickled: others may write where a cache lies.
    """
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{file} was changed while the token cache was being built; type the same command again.")
    return SharedEncoder(RecordEncoder(*pickle.loads(content)), file, sha256)


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """Records that lie one after another, or anywhere, in a spool file."""

    spool: str
    offsets: np.ndarray
    lengths: np.ndarray
    measured: int
    in_bulk: bool
    """By the faster encoder, which has been proven to give the same ids."""


def encode_task(shared: SharedEncoder, task: EncodeTask) -> EncodedBatch:
    """Read a task's records and encode them."""
    with open(task.spool, "rb") as stream:
        records = []
        for offset, length in zip(task.offsets.tolist(), task.lengths.tolist(), strict=True):
            stream.seek(offset)
            records.append(load_record(stream.read(length)))
    return shared.encoder.encode(records, task.measured, task.in_bulk)
