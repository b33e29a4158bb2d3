"""The faster encoder of byte-level BPE (Llama 3, SmolLM2): tiktoken over the tokenizer's own merges."""

from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cqlora.data.bulk_encoder import BulkEncoder, Spelling, build_encoder
from cqlora.data.bulk_lone import character_table
from cqlora.data.byte_level import byte_letters

_GPT2 = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after every digit has been set apart: white space before a digit ends its stretch of text.
_SINGLE_DIGITS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

HAN = [chr(point) for low, high in ((0x3400, 0x4DB5), (0x4E00, 0x9FA5)) for point in range(low, high + 1)]
"""Chinese characters that every version of Unicode in use holds for letters; all are three bytes of UTF-8."""
_HAN_BYTES = [*range(0x80, 0xC0), *range(0xE3, 0xEA)]


def open_byte_encoder(document: dict[str, Any], tokenizer: Tokenizer, dtype: np.dtype[Any]) -> BulkEncoder | None:
    """The encoder of a tokenizer.json of byte-level BPE; None for another kind.

    A token that does not come back whole when it stands alone makes it another kind too.
    """
    pattern = splitting_pattern(document)
    if pattern is None or not has_plain_merges(document):
        return None
    ranks = rank_merges(document["model"]["merges"])
    if ranks is None:
        return None
    vocabulary, letters = document["model"]["vocab"], dict(enumerate(byte_letters()))
    names = [word.decode("latin-1").translate(letters) for word in ranks]
    known = np.array([name in vocabulary for name in names])
    if not all(len(tokenizer.model.tokenize(name)) == 1 for name in names if name in vocabulary):
        return None
    ids = np.array([vocabulary[name] for name in names if name in vocabulary], dtype=dtype)
    words = list(ranks)
    widths = np.array(list(map(len, words)))
    spelling = Spelling(known.astype(np.int64), ids, widths[known], np.where(known, 0, widths))
    lone = lone_letters(words) if takes_letters_alike(pattern) and known[_HAN_BYTES].all() else ""
    return build_encoder(pattern, ranks, spelling, lone[:-1], lone[-1:], character_table(HAN), words)


def takes_letters_alike(pattern: str) -> bool:
    """Whether a stretch of letters is one word however long it is and whichever letters they are."""
    return r"\p{L}+" in pattern and pattern.isascii() and not any(odd in pattern for odd in (r"\u", r"\x", "Han"))


def lone_letters(words: Iterable[bytes]) -> str:
    """The characters of HAN that no word joins to another of HAN."""
    by_head, by_tail = han_by_part()
    joined: set[str] = set()
    for word in words:
        if word.isascii():
            continue
        starts = [place for place, byte in enumerate(word) if place and byte & 0xC0 != 0x80]
        parts = [word[start:end] for start, end in pairwise([0, *starts, len(word)])]
        for left, right in pairwise(parts):
            before, after = by_tail.get(left), by_head.get(right)
            if before and after:
                joined |= before | after
    return "".join(letter for letter in HAN if letter not in joined)


@cache
def han_by_part() -> tuple[dict[bytes, set[str]], dict[bytes, set[str]]]:
    """The letters of HAN whose UTF-8 begins with some bytes, and those whose UTF-8 ends with some."""
    by_head: dict[bytes, set[str]] = defaultdict(set)
    by_tail: dict[bytes, set[str]] = defaultdict(set)
    for letter in HAN:
        data = letter.encode()
        for bound in range(1, len(data) + 1):
            by_head[data[:bound]].add(letter)
            by_tail[data[-bound:]].add(letter)
    return dict(by_head), dict(by_tail)


def splitting_pattern(document: dict[str, Any]) -> str | None:
    """The regular expression by which the tokenizer splits text into words; None for kinds not known here."""
    pre_tokenizer = document.get("pre_tokenizer") or {}
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *before, last = parts
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        if not before:
            return _GPT2
        single_digits = len(before) == 1 and before[0].get("type") == "Digits" and before[0]["individual_digits"]
        return _SINGLE_DIGITS if single_digits else None
    split = before[0] if len(before) == 1 else {}
    isolated = split.get("type") == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    pattern = split["pattern"].get("Regex") if isolated else None
    return pattern if isinstance(pattern, str) else None


def has_plain_merges(document: dict[str, Any]) -> bool:
    """Whether the model is BPE with nothing around it that tiktoken would not do."""
    model = document["model"]
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "unk_token")
    matched_in_text = [token for token in document.get("added_tokens") or [] if not token["special"]]
    return (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in odd)
        and document.get("normalizer") is None
        and not matched_in_text
    )


def rank_merges(merges: list[Any]) -> dict[bytes, int] | None:
    """Bytes of each token in the order of its merge, single bytes first; None where a token has two ranks."""
    to_byte = {ord(letter): byte for byte, letter in enumerate(byte_letters())}
    ranks = {bytes([byte]): byte for byte in range(256)}
    newest = b""
    for merge in merges:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        word = (left + right).translate(to_byte).encode("latin-1")
        if word not in ranks:
            ranks[word] = len(ranks)
            newest = word
        elif word != newest:
            return None
    return ranks
