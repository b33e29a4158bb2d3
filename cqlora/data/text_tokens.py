"""The tokens of many texts at once, whichever tokenizer gave them."""

from itertools import chain
from typing import Any, Protocol

import numpy as np
from tokenizers import Encoding


class TextTokens(Protocol):
    """The tokens of many texts, and where in them they end."""

    ids: np.ndarray
    """(tokens,), text after text."""
    offsets: np.ndarray
    """int64 (texts + 1,): where each text's tokens begin."""

    def character_ends(self, number: int, tokens: list[int]) -> list[int]:
        """The characters at which tokens of a text end; one of several tokens ends with the first of them."""

    def count_over(self, number: int, marked: np.ndarray) -> int:
        """How many tokens of a text cover a character that is marked; `marked` is bool (characters,)."""


class StockTokens:
    """From `tokenizers`."""

    def __init__(self, encodings: list[Encoding], dtype: np.dtype[Any]) -> None:
        self._encodings = encodings
        self.ids: np.ndarray = np.fromiter(chain.from_iterable(each.ids for each in encodings), dtype=dtype)
        self.offsets: np.ndarray = np.cumsum([0, *map(len, encodings)])

    def character_ends(self, number: int, tokens: list[int]) -> list[int]:
        """See TextTokens."""
        ends = self._encodings[number].offsets
        return [ends[token][1] for token in tokens]

    def count_over(self, number: int, marked: np.ndarray) -> int:
        """See TextTokens."""
        before = np.concatenate([[0], np.cumsum(marked)])
        spans = np.array(self._encodings[number].offsets, dtype=np.int64).reshape(-1, 2)
        return int((before[spans[:, 1]] > before[spans[:, 0]]).sum())
