"""Characters that no token joins to their neighbours: their ids are looked up, however long the stretch of them.

Most bases know few Chinese words, so that nearly every Chinese character is encoded by itself. Such a stretch is
taken out of the text before tiktoken sees it, one stand-in is left in its place, so that nothing grows together
across it, and the stretch is put back among the ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from cqlora.data.bulk_ranks import encode_ranks

BASIC_PLANE = 1 << 16


@dataclass(frozen=True, slots=True)
class LoneCharacters:
    """Lone characters of the basic plane, and how to take them out and put them back."""

    elements: np.ndarray
    """int32 (BASIC_PLANE,): a character's element (see Spelling), -1 for one that is not lone."""
    neighbours: np.ndarray | None
    """bool (BASIC_PLANE,): characters beside which a lone one stays so; None where it stays so beside any."""
    stand_in: str
    """A lone character that stands for a stretch of others; a text that holds it cannot be encoded here."""
    stand_in_rank: int

    def encode(self, encoding: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """int64 (elements,) of all texts, and (texts + 1,) where each text's begin."""
        encoded = [text.encode("utf-16-le") for text in texts]
        starts = np.cumsum([0, *(len(each) // 2 for each in encoded)])
        units = np.frombuffer(b"".join(encoded), dtype="<u2")
        element_of = np.take(self.elements, units)
        taken = self._taken_out(units, element_of)
        begins = stretch_starts(taken, starts)
        kept = begins | ~taken
        shortened = np.where(begins, np.uint16(ord(self.stand_in)), units)[kept]
        bounds = np.concatenate([[0], np.cumsum(kept)])[starts]
        ranks, offsets = encode_ranks(encoding, decode_units(shortened, bounds))
        stood_in = ranks == self.stand_in_rank
        lengths = np.ones(len(ranks), dtype=np.int64)
        lengths[stood_in] = stretch_lengths(taken, begins)
        elements = np.repeat(ranks, lengths)
        elements[np.repeat(stood_in, lengths)] = element_of[taken]
        return elements, np.concatenate([[0], np.cumsum(lengths)])[offsets]

    def _taken_out(self, units: np.ndarray, element_of: np.ndarray) -> np.ndarray:
        """bool (units,): lone characters whose neighbours on both sides leave them so."""
        taken: np.ndarray = element_of >= 0
        if self.neighbours is not None:
            beside = np.take(self.neighbours, units)
            taken[1:] &= beside[:-1]
            taken[:-1] &= beside[1:]
        return taken


def stretch_starts(taken: np.ndarray, text_starts: np.ndarray) -> np.ndarray:
    """bool (units,): where a stretch begins; none reaches from one text into the next."""
    fresh = np.zeros(len(taken) + 1, dtype=bool)
    fresh[text_starts] = True
    fresh[1:-1] |= ~taken[:-1]
    starts: np.ndarray = taken & fresh[:-1]
    return starts


def stretch_lengths(taken: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """int64 (stretches,): characters of each."""
    first = np.flatnonzero(begins[taken])
    return np.diff(first, append=int(taken.sum()))


def decode_units(units: np.ndarray, bounds: np.ndarray) -> list[str]:
    """The texts that lie between `bounds` in UTF-16."""
    data, ends = units.tobytes(), (2 * bounds).tolist()
    return [data[start:end].decode("utf-16-le") for start, end in pairwise(ends)]


def character_table(characters: Iterable[str]) -> np.ndarray:
    """bool (BASIC_PLANE,): True for these characters."""
    table = np.zeros(BASIC_PLANE, dtype=bool)
    table[[ord(character) for character in characters]] = True
    return table
