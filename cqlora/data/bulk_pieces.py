"""The faster encoder of SentencePiece BPE with byte fallback (LLaMA, Llama 2): tiktoken over the pieces' bytes.

SentencePiece joins the neighbours whose union has the best score; tiktoken those whose union has the lowest rank.
Ranked by score the two agree, once the bytes of each character that is a piece have been joined first: the joins
inside characters get the lowest ranks. Text is cut beforehand wherever no piece reaches across, so that a
paragraph of Chinese is not one long word.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cqlora.data.bulk_ranks import encode_ranks, open_encoding

_SPACE = "▁"
_NORMALIZER = [
    {"type": "Prepend", "prepend": _SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
]


@dataclass(frozen=True, slots=True)
class PieceEncoder:
    """tiktoken over a tokenizer.json's own pieces."""

    encoding: Any
    tokenizer: Tokenizer
    """Encodes the rare text that holds the space mark itself."""
    first: np.ndarray
    """int64 (ranks,): where a rank's ids begin in `ids`."""
    counts: np.ndarray
    """int64 (ranks,): how many ids it has: one, or one a byte for a part of a character."""
    ids: np.ndarray
    """int64: tokenizer.json's ids, rank after rank."""
    widths: np.ndarray
    """int64, as `ids`: bytes of text under each, the space mark counting as the space that it stands for."""
    texts: list[bytes]

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """int64 (tokens,) twice: ids, and the byte of the UTF-8 text at which each token ends."""
        if not text:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if _SPACE in text:
            return self.encode_slowly(text)
        ranks = encode_ranks(self.encoding, _SPACE + text.replace(" ", _SPACE))
        counts = self.counts[ranks]
        places = np.repeat(self.first[ranks], counts)
        if len(places) > len(ranks):
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            places += np.arange(len(places)) - starts
        # The space before the first word is no part of the text.
        return self.ids[places], np.maximum(np.cumsum(self.widths[places]) - 1, 0)

    def encode_slowly(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The same by the tokenizer itself."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        starts = np.cumsum([0, *(len(character.encode()) for character in text)])
        ends = np.maximum.accumulate([end for _, end in encoding.offsets])
        return np.array(encoding.ids, dtype=np.int64), starts[ends]


def open_piece_encoder(document: dict[str, Any], tokenizer: Tokenizer) -> PieceEncoder | None:
    """The encoder of a tokenizer.json with LLaMA's normaliser and byte fallback; None for another kind."""
    if not has_pieces(document):
        return None
    vocabulary = document["model"]["vocab"]
    pieces = rank_pieces(document["model"]["merges"])
    if pieces is None or any(_SPACE in piece.lstrip(_SPACE) for piece in pieces):
        return None
    # A piece that its own text is not segmented into is never reached, and must not be by a shorter way.
    pieces = [piece for piece in pieces if len(tokenizer.model.tokenize(piece)) == 1]
    letters = sorted(piece for piece in vocabulary if len(piece) == 1 and not piece.isascii())
    ranks = rank_bytes(letters, pieces)
    spelled = [spell(word, vocabulary) for word in ranks]
    if any(None in ids for ids in spelled):
        return None
    counts = np.array([len(ids) for ids in spelled], dtype=np.int64)
    return PieceEncoder(
        open_encoding(cutting_pattern(pieces), ranks),
        tokenizer,
        np.cumsum(counts) - counts,
        counts,
        np.array([token_id for ids in spelled for token_id in ids], dtype=np.int64),
        np.array([width for word, ids in zip(ranks, spelled, strict=True) for width in widths(word, len(ids))]),
        [piece.replace(_SPACE, " ").encode() for piece in (*pieces, *letters)],
    )


def has_pieces(document: dict[str, Any]) -> bool:
    """Whether text becomes pieces as LLaMA's does, with nothing around it that tiktoken would not do."""
    model, normalizer = document["model"], document.get("normalizer") or {}
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    matched_in_text = [token for token in document.get("added_tokens") or [] if not token["special"]]
    return (
        model.get("type") == "BPE"
        and bool(model.get("byte_fallback"))
        and not any(model.get(key) for key in odd)
        and normalizer.get("normalizers") == _NORMALIZER
        and document.get("pre_tokenizer") is None
        and not matched_in_text
    )


def rank_pieces(merges: list[Any]) -> list[str] | None:
    """The merged pieces in the order of their merges; None where a piece has two ranks."""
    ranked: dict[str, None] = {}
    newest = ""
    for merge in merges:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        piece = left + right
        if piece not in ranked:
            ranked[piece] = None
            newest = piece
        elif piece != newest:
            return None
    return list(ranked)


def rank_bytes(letters: list[str], pieces: list[str]) -> dict[bytes, int]:
    """Ranks of single bytes, then of the joins inside characters, then of pieces."""
    words = [bytes([byte]) for byte in range(256)]
    words += [letter.encode()[:end] for letter in letters for end in range(2, len(letter.encode()) + 1)]
    words += [piece.encode() for piece in pieces]
    return {word: rank for rank, word in enumerate(dict.fromkeys(words))}


def spell(word: bytes, vocabulary: dict[str, int]) -> list[int | None]:
    """The ids of a rank: its piece's, or one a byte where it is no piece."""
    try:
        piece = word.decode()
    except UnicodeDecodeError:
        piece = ""
    if piece in vocabulary:
        return [vocabulary[piece]]
    return [vocabulary.get(f"<0x{byte:02X}>") for byte in word]


def widths(word: bytes, tokens: int) -> list[int]:
    """Bytes of text under each token of a rank."""
    return [1] * tokens if tokens > 1 else [len(word.replace(_SPACE.encode(), b" "))]


def cutting_pattern(pieces: list[str]) -> str:
    """What is encoded as one word: spaces and the letters that pieces join, or whatever they do not."""
    joined = sorted({letter for piece in pieces for letter in piece} - {_SPACE})
    letters = "".join(map(re.escape, joined))
    return f"{_SPACE}*[{letters}]+|{_SPACE}+|[^{letters}{_SPACE}]"
