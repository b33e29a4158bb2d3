"""Chunks of at most a sequence's length: their tokens, their label masks, and how much text they cover."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(slots=True)
class EncodedBatch:
    """Chunks of several records, one after another."""

    tokens: np.ndarray
    """uint16 or uint32 (tokens,)."""
    labels: np.ndarray
    """uint8 (tokens,): 1 where the token is predicted and counted."""
    lengths: np.ndarray
    """uint32 (chunks,): tokens of each chunk."""
    label_tokens: np.ndarray
    """uint32 (chunks,)."""
    characters: np.ndarray
    """uint32 (chunks,): characters of the text under a chunk's labels."""
    utf8_bytes: np.ndarray
    """uint32 (chunks,)."""
    records: np.ndarray
    """uint32 (chunks,): which record of the batch a chunk is cut from."""
    counts: Counter[str] = field(default_factory=Counter)
    han_tokens: int = 0
    """Tokens that cover a Han character, in the records that were measured."""
    han_characters: int = 0


@dataclass(slots=True)
class Chunks:
    """Grows while a batch is encoded."""

    tokens: list[Sequence[int]] = field(default_factory=list)
    labels: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list)
    label_tokens: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    utf8_bytes: list[int] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, record: int, ids: Sequence[int], labels: bytes, characters: int, utf8_bytes: int) -> None:
        """One chunk; its first token has nothing before it and is never a label."""
        label_tokens = labels.count(1)
        if labels[0]:
            raise AssertionError("a chunk's first token cannot be a label")
        if not label_tokens:
            self.counts["chunks without a label left out"] += 1
            return
        self.tokens.append(ids)
        self.labels.extend(labels)
        self.lengths.append(len(ids))
        self.label_tokens.append(label_tokens)
        self.characters.append(characters)
        self.utf8_bytes.append(utf8_bytes)
        self.records.append(record)

    def batch(self, dtype: np.dtype[Any]) -> EncodedBatch:
        """All of them."""
        tokens = [np.asarray(ids, dtype=dtype) for ids in self.tokens]
        return EncodedBatch(
            tokens=np.concatenate(tokens) if tokens else np.zeros(0, dtype=dtype),
            labels=np.frombuffer(bytes(self.labels), dtype=np.uint8),
            lengths=np.array(self.lengths, dtype=np.uint32),
            label_tokens=np.array(self.label_tokens, dtype=np.uint32),
            characters=np.array(self.characters, dtype=np.uint32),
            utf8_bytes=np.array(self.utf8_bytes, dtype=np.uint32),
            records=np.array(self.records, dtype=np.uint32),
            counts=self.counts,
        )


def cut_points(tokens: int, sequence_length: int) -> list[tuple[int, int]]:
    """Consecutive (start, end) of at most `sequence_length` tokens; none of one token, which could train nothing."""
    cuts = list(range(0, tokens, sequence_length))
    if len(cuts) > 1 and tokens - cuts[-1] == 1 and sequence_length > 1:
        cuts[-1] -= 1
    return list(zip(cuts, [*cuts[1:], tokens], strict=True))


def join_batches(first: EncodedBatch, second: EncodedBatch) -> EncodedBatch:
    """The chunks of both in the order of their records."""
    order = np.argsort(np.concatenate([first.records, second.records]), kind="stable")

    def by_chunk(name: str) -> np.ndarray:
        column: np.ndarray = np.concatenate([getattr(first, name), getattr(second, name)])
        return column[order]

    def by_token(name: str) -> np.ndarray:
        ends = ((getattr(each, name), np.cumsum(each.lengths).tolist()) for each in (first, second))
        parts = [values[start:end] for values, bounds in ends for start, end in pairwise([0, *bounds])]
        return np.concatenate([parts[number] for number in order.tolist()])

    return EncodedBatch(
        tokens=by_token("tokens"),
        labels=by_token("labels"),
        lengths=by_chunk("lengths"),
        label_tokens=by_chunk("label_tokens"),
        characters=by_chunk("characters"),
        utf8_bytes=by_chunk("utf8_bytes"),
        records=by_chunk("records"),
        counts=first.counts + second.counts,
    )
