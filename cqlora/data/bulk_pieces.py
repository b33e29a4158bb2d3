"""The faster encoder of SentencePiece BPE with byte fallback (LLaMA, Llama 2): tiktoken over the pieces' bytes.

SentencePiece joins the neighbours whose union has the best score; tiktoken those whose union has the lowest rank.
Ranked by score the two agree, once the bytes of each character that is a piece have been joined first: the joins
inside characters get the lowest ranks. Text is cut beforehand wherever no piece reaches across, so that a
paragraph of Chinese is not one long word.
"""

import re
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cqlora.data.bulk_encoder import BulkEncoder, Spelling, build_encoder
from cqlora.data.bulk_lone import BASIC_PLANE

_SPACE = "▁"
_STAND_IN = "\x01"
"""For a stretch of lone characters: no clean text holds it, and it is one byte."""
_NORMALIZER = [
    {"type": "Prepend", "prepend": _SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
]


def open_piece_encoder(document: dict[str, Any], tokenizer: Tokenizer, dtype: np.dtype[Any]) -> BulkEncoder | None:
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
    joined = joined_letters(pieces)
    return build_encoder(
        cutting_pattern(joined),
        ranks,
        spell_ranks(list(ranks), spelled, dtype),
        lone_letters(joined),
        _STAND_IN,
        None,
        [piece.replace(_SPACE, " ").encode() for piece in (*pieces, *letters)],
        prepare=write_spaces,
        # The space before the first word is no part of the text.
        unwritten=1,
        reserved=_SPACE,
    )


def write_spaces(text: str) -> str:
    """What LLaMA's normaliser makes of a text."""
    return _SPACE + text.replace(" ", _SPACE) if text else text


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


def spell_ranks(words: list[bytes], spelled: list[list[int | None]], dtype: np.dtype[Any]) -> Spelling:
    """The ids of each rank; the space mark is as wide as the space that it stands for."""
    counts = np.array([len(ids) for ids in spelled])
    widths = [
        width
        for word, ids in zip(words, spelled, strict=True)
        for width in ([1] * len(ids) if len(ids) > 1 else [len(word.replace(_SPACE.encode(), b" "))])
    ]
    ids = np.array([token for row in spelled for token in row], dtype=dtype)
    return Spelling(counts, ids, np.array(widths), np.zeros_like(counts))


def joined_letters(pieces: list[str]) -> list[str]:
    """The characters that pieces join to others."""
    return sorted({letter for piece in pieces for letter in piece} - {_SPACE})


def lone_letters(joined: list[str]) -> str:
    """The characters that no piece joins to another; none where pieces join even the stand-in."""
    if _STAND_IN in joined:
        return ""
    taken = {*joined, _SPACE, _STAND_IN, " "}
    points = (*range(0xD800), *range(0xE000, BASIC_PLANE))
    return "".join(letter for letter in map(chr, points) if letter not in taken)


def cutting_pattern(joined: list[str]) -> str:
    """What is encoded as one word: spaces and the letters that pieces join, or whatever they do not."""
    letters = "".join(map(re.escape, joined))
    return f"{_SPACE}*[{letters}]+|{_SPACE}+|[^{letters}{_SPACE}]"
