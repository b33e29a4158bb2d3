"""Many texts to ids at once: tiktoken for what must be searched, a table for characters that stand alone."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from cqlora.data.bulk_lone import BASIC_PLANE, LoneCharacters
from cqlora.data.bulk_ranks import encode_ranks, open_encoding


class Spelling:
    """The ids of elements, which are tiktoken's ranks and, numbered after them, lone characters.

    An element is one id, several (a character of byte tokens), or none (a byte that the vocabulary lacks). All lie
    in rows as wide as the longest, so that any number of elements are spelled by two array operations.
    """

    def __init__(self, counts: np.ndarray, ids: np.ndarray, widths: np.ndarray, left_out: np.ndarray) -> None:
        """`counts` is (elements,); `ids` and `widths`, the bytes of text under each id, are those of all elements."""
        self.counts = counts
        self.left_out = left_out
        """int64 (elements,): bytes of text under an element without ids."""
        self.leaves_out = bool(left_out.any())
        # NumPy takes rows of a power of two in bytes several times faster than others.
        self.used = np.arange(1 << (int(counts.max()) - 1).bit_length()) < counts[:, None]
        """bool (elements, longest): which places of a row hold something."""
        self.ids = np.zeros(self.used.shape, dtype=ids.dtype)
        self.ids[self.used] = ids
        self.widths = np.zeros(self.used.shape, dtype=np.uint16)
        self.widths[self.used] = widths

    def spell(self, rows: np.ndarray, elements: np.ndarray) -> np.ndarray:
        """(tokens,): the entries of `ids` or `widths` under these elements, one after another."""
        spelled: np.ndarray = np.take(rows, elements, axis=0)[np.take(self.used, elements, axis=0)]
        return spelled

    def join(self, counts: np.ndarray, ids: np.ndarray, widths: np.ndarray) -> "Spelling":
        """These elements and more of them, numbered after these."""
        return Spelling(
            np.concatenate([self.counts, counts]),
            np.concatenate([self.ids[self.used], ids]),
            np.concatenate([self.widths[self.used], widths]),
            np.concatenate([self.left_out, np.zeros_like(counts)]),
        )


class BulkTokens:
    """The tokens of many texts."""

    def __init__(self, encoder: "BulkEncoder", texts: list[str], elements: np.ndarray, bounds: np.ndarray) -> None:
        self._encoder = encoder
        self._texts = texts
        self._elements = elements
        self._bounds = bounds
        spelling = encoder.spelling
        self.ids = spelling.spell(spelling.ids, elements)
        """(tokens,), text after text."""
        self.offsets: np.ndarray = np.concatenate([[0], np.cumsum(spelling.counts[elements])])[bounds]
        """int64 (texts + 1,): where each text's tokens begin."""

    def byte_ends(self, number: int) -> np.ndarray:
        """int64 (tokens,): the byte of a text's UTF-8 at which each of its tokens ends."""
        spelling = self._encoder.spelling
        elements = self._elements[slice(*self._bounds[number : number + 2])]
        ends = np.cumsum(spelling.spell(spelling.widths, elements), dtype=np.int64)
        if spelling.leaves_out:
            ends += np.repeat(np.cumsum(spelling.left_out[elements]), spelling.counts[elements])
        # As `tokenizers` has it, a space put before a text belongs to its first character.
        unwritten = self._encoder.unwritten
        return np.maximum(ends - unwritten, unwritten)

    def character_ends(self, number: int, tokens: list[int]) -> list[int]:
        """The characters at which tokens of a text end; one of several tokens ends with the first of them."""
        begins = (np.frombuffer(self._texts[number].encode(), dtype=np.uint8) & 0xC0) != 0x80
        ends = self.byte_ends(number)[tokens].tolist()
        return list(accumulate(int(np.count_nonzero(begins[start:end])) for start, end in pairwise([0, *ends])))

    def count_over(self, number: int, marked: np.ndarray) -> int:
        """How many tokens of a text cover a character that is marked; `marked` is bool (characters,)."""
        data = np.frombuffer(self._texts[number].encode(), dtype=np.uint8)
        of_bytes = marked[np.cumsum((data & 0xC0) != 0x80) - 1]
        before = np.concatenate([[0], np.cumsum(of_bytes)])[self.byte_ends(number)]
        return int((np.diff(before, prepend=0) > 0).sum())


@dataclass(frozen=True, slots=True)
class BulkEncoder:
    """tiktoken over a tokenizer.json's own vocabulary, with a way around it for lone characters."""

    encoding: Any
    spelling: Spelling
    lone: LoneCharacters | None
    """None where every character may be joined to another."""
    words: list[bytes]
    """UTF-8 of what the vocabulary can say, one word after another."""
    prepare: Callable[[str], str] = str
    """What the tokenizer does to a text before it looks for words."""
    unwritten: int = 0
    """Bytes that `prepare` puts before a text."""
    reserved: str = ""
    """A character whose texts only the tokenizer itself can encode."""

    def takes(self, texts: list[str]) -> bool:
        """Whether no text holds a character that this encoder needs for itself."""
        reserved = self.reserved + (self.lone.stand_in if self.lone else "")
        return not any(character in text for text in texts for character in reserved)

    def encode(self, texts: list[str]) -> BulkTokens:
        """The tokens of texts that it takes."""
        prepared = [self.prepare(text) for text in texts]
        found = self.lone.encode(self.encoding, prepared) if self.lone else encode_ranks(self.encoding, prepared)
        return BulkTokens(self, texts, *found)


def build_encoder(
    pattern: str,
    ranks: dict[bytes, int],
    spelling: Spelling,
    lone: str,
    stand_in: str,
    neighbours: np.ndarray | None,
    words: list[bytes],
    **rest: Any,
) -> BulkEncoder:
    """The encoder of these ranks, with the characters of `lone` looked up where there are any."""
    if not lone:
        return BulkEncoder(open_encoding(pattern, ranks), spelling, None, words, **rest)
    ranks, spelling = add_stand_in(stand_in.encode(), ranks, spelling)
    encoding = open_encoding(pattern, ranks)
    found, _ = encode_ranks(encoding, [lone])
    ids, widths = (spelling.spell(rows, found) for rows in (spelling.ids, spelling.widths))
    ends = np.cumsum([len(character.encode()) for character in lone])
    owners = np.searchsorted(ends, np.cumsum(widths, dtype=np.int64))
    elements = np.full(BASIC_PLANE, -1, dtype=np.int32)
    elements[[ord(character) for character in lone]] = len(ranks) + np.arange(len(lone))
    spelling = spelling.join(np.bincount(owners, minlength=len(lone)), ids, widths)
    looked_up = LoneCharacters(elements, neighbours, stand_in, ranks[stand_in.encode()])
    return BulkEncoder(encoding, spelling, looked_up, words, **rest)


def add_stand_in(stand_in: bytes, ranks: dict[bytes, int], spelling: Spelling) -> tuple[dict[bytes, int], Spelling]:
    """`ranks` by which the bytes of a character become one rank, after all joins that the tokenizer knows."""
    ranks = dict(ranks)
    for word in (stand_in[:2], stand_in):
        if word not in ranks:
            parts = np.array([ranks[bytes([byte])] for byte in word])
            ids, widths = (spelling.spell(rows, parts) for rows in (spelling.ids, spelling.widths))
            ranks[word] = len(ranks)
            spelling = spelling.join(np.array([len(ids)]), ids, widths)
    return ranks, spelling
