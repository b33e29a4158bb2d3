"""Held-out text: token losses in strided windows, told per token, character and byte, with errors over documents."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cqlora.data.held_out import HeldOutText
from cqlora.evaluation.statistics import Estimate, ratio
from cqlora.system.sealed import hash_document

if TYPE_CHECKING:
    from cqlora.engine import LlamaEngine

BITS = 1 / math.log(2)
"""In one nat."""

T = TypeVar("T")
Tick = Callable[[int], None]
"""(documents scored so far)."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How documents longer than a model may read are read, and how much at once."""

    window: int
    """Tokens that a prediction may look back on."""
    stride: int
    """Tokens that a further window predicts: each of them has window - stride or more before it."""
    batch_tokens: int
    """Tokens in one forward pass; a single window may have more."""


@dataclass(frozen=True, slots=True)
class TextScore:
    """What one model makes of the documents of one source and language."""

    text: HeldOutText
    nats: np.ndarray
    """float64 (documents,): sum of each document's token losses, its end among them."""
    tokens: int
    """Predicted tokens of all documents."""

    @property
    def loss(self) -> float:
        """Nats per token; comparable under one tokenizer only."""
        return float(self.nats.sum()) / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the loss, infinite beyond what a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_character(self) -> Estimate:
        """Comparable across vocabularies."""
        return ratio(self.nats * BITS, [len(document) for document in self.text.documents])

    @property
    def bits_per_byte(self) -> Estimate:
        """Comparable across vocabularies and languages."""
        return ratio(self.nats * BITS, [len(document.encode()) for document in self.text.documents])

    def difference(self, other: "TextScore") -> dict[str, Any]:
        """How many bits more than `other` this model needs, paired over the same documents."""
        return _named(replace_nats(self, self.nats - other.nats), "_difference")

    def describe(self) -> dict[str, Any]:
        """For the record."""
        return {
            "source": self.text.source,
            "language": self.text.language,
            "documents": len(self.text.documents),
            "characters": self.text.characters,
            "bytes": self.text.bytes,
            "tokens": self.tokens,
            "loss": self.loss,
            "perplexity": self.perplexity,
            **_named(self),
            "text_sha256": hash_document(self.text.documents),
        }


def replace_nats(score: TextScore, nats: np.ndarray) -> TextScore:
    """The same documents with other losses."""
    return TextScore(score.text, nats, score.tokens)


def _named(score: TextScore, suffix: str = "") -> dict[str, Any]:
    """Both kinds of bits with their errors, under the names of the record."""
    named: dict[str, Any] = {}
    for key, estimate in (("bits_per_character", score.bits_per_character), ("bits_per_byte", score.bits_per_byte)):
        named[key + suffix], named[f"{key}{suffix}_error"] = estimate
    return named


def score_text(engine: "LlamaEngine", text: HeldOutText, windows: Windows, tick: Tick) -> TextScore:
    """Score every document, each by itself: its start is given, its end is predicted."""
    from cqlora.inference.decoder import Query

    nats = np.zeros(len(text.documents))
    tokens = 0

    def queries() -> Iterator[tuple[int, Query]]:
        for number, document in enumerate(text.documents):
            ids = engine.encode_document(document)
            for start, scored, end in cut_windows(len(ids), windows.window, windows.stride):
                yield number, Query(ids[start : end - 1], [ids[scored:end]])

    for batch in batch_by_tokens(queries(), lambda each: len(each[1].ids), windows.batch_tokens):
        for (number, query), scores in zip(batch, engine.score([query for _, query in batch]), strict=True):
            nats[number] -= scores.log_probabilities.sum(dtype=np.float64)
            tokens += len(query.targets[0])
        tick(batch[-1][0] + 1)
    return TextScore(text, nats, tokens)


def cut_windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first predicted, end) of the windows over `count` tokens.

    Tokens from `start` to `end` - 1 are read, at most `window` of them, and each token but the first is predicted in
    exactly one window.
    """
    scored = 1
    while scored < count:
        end = min(count, scored + (window if scored == 1 else stride))
        yield max(0, end - 1 - window), scored, end
        scored = end


def batch_by_tokens(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Consecutive items whose sizes add up to at most `most`, or a single larger one."""
    batch: list[T] = []
    held = 0
    for item in items:
        if batch and held + size(item) > most:
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += size(item)
    if batch:
        yield batch


def score_sequences(engine: "LlamaEngine", sequences: Sequence[Sequence[int]], batch_tokens: int) -> list[np.ndarray]:
    """float32 (tokens - 1,) log-probabilities of each sequence's tokens after the first."""
    from cqlora.inference.decoder import Query

    queries = [Query(ids[:-1], [ids[1:]]) for ids in sequences]
    batches = batch_by_tokens(queries, lambda query: len(query.ids), batch_tokens)
    return [scores.log_probabilities[0] for scores in chain.from_iterable(map(engine.score, batches))]
