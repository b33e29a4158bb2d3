"""The faster encoder of byte-level BPE (Llama 3, SmolLM2): tiktoken over the tokenizer's own merges."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cqlora.data.bulk_ranks import encode_ranks, open_encoding
from cqlora.data.byte_level import byte_letters

_GPT2 = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after every digit has been set apart: white space before a digit ends its stretch of text.
_SINGLE_DIGITS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class ByteEncoder:
    """tiktoken over a tokenizer.json's own merges and pattern."""

    encoding: Any
    ids: np.ndarray
    """int64 (ranks,): tokenizer.json's id of each rank; -1 for bytes that it does not know and leaves out."""
    widths: np.ndarray
    """int64 (ranks,): bytes of each rank."""

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """int64 (tokens,) twice: ids, and the byte of the UTF-8 text at which each token ends."""
        ranks = encode_ranks(self.encoding, text)
        ids, ends = self.ids[ranks], np.cumsum(self.widths[ranks])
        known = ids >= 0
        return (ids, ends) if known.all() else (ids[known], ends[known])

    @property
    def texts(self) -> list[bytes]:
        """The bytes of each rank."""
        return list(self.encoding._mergeable_ranks)


def open_byte_encoder(document: dict[str, Any], tokenizer: Tokenizer) -> ByteEncoder | None:
    """The encoder of a tokenizer.json of byte-level BPE; None for another kind.

    A token that does not come back whole when it stands alone makes it another kind too.
    """
    pattern = splitting_pattern(document)
    if pattern is None or not has_plain_merges(document):
        return None
    ranks = rank_merges(document["model"]["merges"])
    if ranks is None:
        return None
    vocabulary, letters = document["model"]["vocab"], byte_letters()
    words = ["".join(letters[byte] for byte in word) for word in ranks]
    if not all(len(tokenizer.model.tokenize(word)) == 1 for word in words if word in vocabulary):
        return None
    return ByteEncoder(
        open_encoding(pattern, ranks),
        np.array([vocabulary.get(word, -1) for word in words], dtype=np.int64),
        np.array([len(word) for word in ranks], dtype=np.int64),
    )


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
    from_letter = {letter: byte for byte, letter in enumerate(byte_letters())}
    ranks = {bytes([byte]): byte for byte in range(256)}
    newest = b""
    for merge in merges:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        word = bytes(from_letter[letter] for letter in left + right)
        if word not in ranks:
            ranks[word] = len(ranks)
            newest = word
        elif word != newest:
            return None
    return ranks
