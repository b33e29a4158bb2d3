"""Keys and values of the sequences that are generated: each by itself, the short ones of a batch side by side."""

from collections.abc import Sequence
from copy import copy

import torch

from cqlora.inference.architecture import Architecture

SHELF_LENGTH = 512
"""Positions up to which replies stand side by side: reading so few keys costs less than calling operators."""
_SHELF_ROW_BYTES = 64 << 20
_STEP = 256
_FINITE_STEP = 64


class KeyValueCache:
    """Keys and values of one sequence, for every layer; grows as the sequence does."""

    def __init__(self, architecture: Architecture, like: torch.Tensor) -> None:
        self.length = 0
        self.store = like.new_empty(architecture.layers, 2, architecture.key_value_heads, 0, architecture.head_dim)
        """(layers, 2, key_value_heads, positions, head_dim); a view of the shelf where the sequence stands there."""

    @property
    def bytes_per_token(self) -> int:
        """Memory of one position."""
        layers, pair, heads, _, head_dim = self.store.shape
        return layers * pair * heads * head_dim * self.store.itemsize

    def reserve(self, length: int) -> None:
        """Make room for `length` positions."""
        held = self.store.shape[3]
        if length <= held:
            return
        # Growing by half keeps the copies of a long reply few, and what lies unused small.
        wanted = max(length, held + held // 2)
        wanted = -(-wanted // _STEP) * _STEP
        grown = self.store.new_empty((*self.store.shape[:3], wanted, self.store.shape[4]))
        grown[:, :, :, : self.length] = self.store[:, :, :, : self.length]
        self.store = grown

    def clear(self) -> None:
        """Forget the sequence and give its memory back, though somebody may still hold this object."""
        self.length = 0
        self.store = self.store.new_empty((*self.store.shape[:3], 0, self.store.shape[4]))

    def copy(self, length: int) -> "KeyValueCache":
        """The first `length` positions, in memory of their own and with room for no more."""
        copied = copy(self)
        copied.length, copied.store = length, self.store[:, :, :, :length].clone()
        return copied

    def hand_over(self) -> "KeyValueCache":
        """The same sequence for another holder; this one is empty afterwards."""
        # A row of the shelf goes to another sequence.
        handed = copy(self) if self.store.is_contiguous() else self.copy(self.length)
        self.clear()
        return handed


class Shelf:
    """Short sequences side by side in one tensor, so that one operator serves all of them.

    Rows in use are always the first ones: when one is freed, the last moves into its place.
    """

    def __init__(self, rows: int) -> None:
        self.caches: list[KeyValueCache] = []
        """By row."""
        self.store = torch.empty(0)
        """(layers, 2, rows, key_value_heads, SHELF_LENGTH, head_dim); empty while nobody stands here."""
        self._rows = rows
        self._finite = 0
        """Positions up to which every row that is taken holds numbers."""

    def arrange(self, caches: Sequence[KeyValueCache]) -> None:
        """Take in those of the caches that are short enough for another token, and let those go that no longer are."""
        short = [cache for cache in caches if cache.length < SHELF_LENGTH and _fits(cache)]
        for cache in list(self.caches):
            if not any(cache is other for other in short):
                cache.reserve(SHELF_LENGTH + 1)
                self.leave(cache)
        if len(short) > 1:
            for cache in short:
                if not any(cache is other for other in self.caches):
                    self._take(cache)
        if self.caches:
            self._make_finite(max(cache.length for cache in self.caches) + 1)

    def leave(self, cache: KeyValueCache) -> None:
        """Free a cache's row, whose contents are lost; nothing happens where it has none."""
        row = next((row for row, other in enumerate(self.caches) if other is cache), None)
        if row is None:
            return
        last = self.caches.pop()
        if last is not cache:
            self._place(last, row)
        if not self.caches:
            self.store, self._finite = torch.empty(0), 0

    def _take(self, cache: KeyValueCache) -> None:
        if not self.caches:
            layers, pair, heads, _, head_dim = cache.store.shape
            self.store = cache.store.new_empty(layers, pair, self._rows, heads, SHELF_LENGTH, head_dim)
        self.caches.append(cache)
        self._place(cache, len(self.caches) - 1)

    def _place(self, cache: KeyValueCache, row: int) -> None:
        self.caches[row] = cache
        place = self.store[:, :, row]
        place[:, :, :, : cache.length] = cache.store[:, :, :, : cache.length]
        place[:, :, :, cache.length : self._finite] = 0
        cache.store = place
        self._make_finite(cache.length)

    def _make_finite(self, length: int) -> None:
        # What is masked is still multiplied, and fresh memory may hold anything. What no sequence reaches stays
        # untouched, and so takes no memory.
        if length > self._finite:
            reached = min(-(-length // _FINITE_STEP) * _FINITE_STEP, SHELF_LENGTH)
            for cache in self.caches:
                cache.store[:, :, :, max(cache.length, self._finite) : reached] = 0
            self._finite = reached


def _fits(cache: KeyValueCache) -> bool:
    layers, pair, heads, _, head_dim = cache.store.shape
    row_bytes: int = layers * pair * heads * SHELF_LENGTH * head_dim * cache.store.itemsize
    return row_bytes <= _SHELF_ROW_BYTES
