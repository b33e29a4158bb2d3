"""Keys and values of prompts and replies that have ended, for the next prompt that begins with the same tokens."""

import threading
from dataclasses import dataclass

import numpy as np

from cqlora.inference.cache import KeyValueCache
from cqlora.inference.decoder import Decoder

LEAST_TOKENS = 16
"""A beginning shorter than this is read again: that is as quick."""
_MOST_SEQUENCES = 256
"""Keeps the search through them short where a sequence takes little memory."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sequence:
    ids: np.ndarray
    """int32, as many as `cache` holds positions."""
    cache: KeyValueCache

    def count_shared(self, ids: np.ndarray) -> int:
        """Tokens at the beginning of both."""
        length = min(len(self.ids), len(ids))
        differs = self.ids[:length] != ids[:length]
        return int(differs.argmax()) if differs.any() else length


class PrefixCache:
    """Keys and values of ended replies, up to a number of bytes; the least recently used go first.

    Only positions whose token and whose tokens before are the same are shared, so nothing of one conversation
    reaches another. Several threads may use it.
    """

    def __init__(self, decoder: Decoder, limit: int) -> None:
        """`limit` is in bytes; 0 keeps nothing."""
        self._decoder = decoder
        self._limit = limit
        self._sequences: list[_Sequence] = []
        """The one used last stands last."""
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return sum(sequence.cache.store.nbytes for sequence in self._sequences)

    def open(self, prompt_ids: list[int]) -> KeyValueCache:
        """A cache that holds the longest known beginning of a prompt, and never all of it; empty where none is known.

        It belongs to the caller. A kept sequence that the prompt goes on from is handed over; of one that parts
        from it a copy is made.
        """
        # The last token is read in any case: the reply begins with its logits.
        ids = np.array(prompt_ids[:-1], dtype=np.int32)
        with self._lock:
            shared, known = max(
                ((sequence.count_shared(ids), place) for place, sequence in enumerate(self._sequences)), default=(0, 0)
            )
            if shared < LEAST_TOKENS:
                return self._decoder.new_cache()
            sequence = self._sequences.pop(known)
            if len(sequence.ids) - shared < LEAST_TOKENS:
                sequence.cache.length = shared
                return sequence.cache
            self._sequences.append(sequence)
            return sequence.cache.copy(shared)

    def keep(self, ids: list[int], cache: KeyValueCache) -> None:
        """Take over what a cache holds, whose first tokens are `ids`; the cache is empty afterwards."""
        if not self._limit:
            cache.clear()
            return
        cache = cache.hand_over()
        if cache.length and cache.store.nbytes > self._limit:
            cache = cache.copy(min(cache.length, self._limit // cache.bytes_per_token))
        if cache.length < LEAST_TOKENS:
            return
        sequence = _Sequence(np.array(ids[: cache.length], dtype=np.int32), cache)
        with self._lock:
            # Of two sequences, one of which begins the other, the longer holds both.
            if any(other.count_shared(sequence.ids) == len(sequence.ids) for other in self._sequences):
                return
            kept = [other for other in self._sequences if other.count_shared(sequence.ids) < len(other.ids)]
            self._sequences = [*kept, sequence][-_MOST_SEQUENCES:]
            while self.nbytes > self._limit:
                del self._sequences[0]
