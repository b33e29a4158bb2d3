"""Records to chunks of at most `sequence_length` tokens, with their label masks and the text they cover."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from cqlora.config.choices import Thinking
from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.data.chunks import Chunks, EncodedBatch, join_batches
from cqlora.data.conversations import ConversationEncoder
from cqlora.data.documents import encode_documents
from cqlora.data.fitting import RenderedConversations
from cqlora.data.language import han_characters
from cqlora.data.records import Conversation, Document, Record, load_record, text_of
from cqlora.data.rendered import TemplateEncoder
from cqlora.data.tokenizer import PlainTokenizer
from cqlora.data.wording import Wording

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
    fast: bool = False
    """Encode by the faster library, proven to give this tokenizer's ids: the one field that changes no token."""
    template: str = ""
    """The chat template in Jinja; empty is ChatML, which is written turn by turn."""
    thinking: Thinking = Thinking.train
    """What becomes of thoughts in replies."""

    @property
    def source(self) -> str:
        """The text of the template that writes a conversation at once; empty where ChatML writes it turn by turn."""
        return self.template or (CHAT_TEMPLATE if self.thinking is Thinking.mask else "")

    @property
    def wording(self) -> Wording:
        """How conversations are written."""
        return Wording(self.folder, self.source, self.thinking, self.system_prompt)


class RecordEncoder:
    """Encodes records for one tokenizer, stage and length."""

    def __init__(self, settings: EncodeSettings) -> None:
        self.settings = settings
        self.tokenizer = PlainTokenizer(Path(settings.folder), settings.fast)

    @cached_property
    def conversations(self) -> ConversationEncoder | RenderedConversations:
        """The template's encoder, made when a first conversation asks for it."""
        settings = self.settings
        if not settings.source:
            return ConversationEncoder(
                self.tokenizer, settings.sequence_length, settings.all_tokens, settings.system_prompt
            )
        encoder = TemplateEncoder(self.tokenizer, Path(settings.folder), settings.source, settings.thinking)
        return RenderedConversations(self.tokenizer, encoder, settings.sequence_length, settings.system_prompt)

    def encode(self, records: Sequence[Record], measured: int = 0) -> EncodedBatch:
        """All chunks of `records` in order; tokens per Han character are measured on the first `measured`."""
        documents = [number for number, record in enumerate(records) if isinstance(record, Document)]
        talks = {number: record for number, record in enumerate(records) if isinstance(record, Conversation)}
        batch = Chunks().batch(self.tokenizer.dtype)
        if documents:
            texts = [text_of(records[number]) for number in documents]
            tokens = self.tokenizer.encode_texts(texts)
            batch = encode_documents(documents, texts, tokens, self.tokenizer.special, self.settings.sequence_length)
        if talks:
            talked = self.conversations.encode(list(talks), list(talks.values()))
            batch = join_batches(batch, talked) if documents else talked
        for record in records[:measured]:
            self.measure_han(batch, text_of(record)[:MEASURED_CHARACTERS])
        return batch

    def measure_han(self, batch: EncodedBatch, text: str) -> None:
        """Count the tokens that cover a Han character, and Han characters, into `batch`."""
        han = han_characters(text)
        if han.any():
            batch.han_tokens += self.tokenizer.encode_texts([text]).count_over(0, han)
            batch.han_characters += int(han.sum())


@lru_cache(maxsize=1)
def open_encoder(settings: EncodeSettings) -> RecordEncoder:
    """The encoder of these settings; a process holds the last one."""
    return RecordEncoder(settings)


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """Some records of a source, which lie anywhere in its spool file."""

    spool: str
    offsets: np.ndarray
    lengths: np.ndarray
    numbers: np.ndarray
    """int64 (records,): which of the source's records they are."""
    source: int = 0
    """Which of the sources it is."""
    measured: int = 0
    """How many of them, the first, tokens per Han character are measured on."""


def encode_task(settings: EncodeSettings, task: EncodeTask) -> EncodedBatch:
    """Read a task's records and encode them."""
    with open(task.spool, "rb") as stream:
        records = []
        for offset, length in zip(task.offsets.tolist(), task.lengths.tolist(), strict=True):
            stream.seek(offset)
            records.append(load_record(stream.read(length)))
    return open_encoder(settings).encode(records, task.measured)
