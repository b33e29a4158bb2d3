"""A second, several times faster encoder for byte-level BPE, used only where it gives the same ids."""

import json
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cqlora.data.sources.location import SAMPLE_DIR

_GPT2 = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after every digit has been set apart: white space before a digit ends its stretch of text.
_SINGLE_DIGITS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

_FUZZED_TEXTS = 4000
_HARD_TEXTS = [
    "", " ", "  a", "a  ", "\n\n a\r\n\t b", "a 1 22  333\n4", "don't I'LL we've", "x\x04y\x00\x7f",
    "\u200b\ufeff", "𠀀𪚥😀👨‍👩‍👧", "é e\u0301", "１２３，。！？", "Ⅷ ½ ²", "\u3000全角　空格",
    "<|im_end|><|im_start|><|endoftext|>",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class BulkEncoder:
    """tiktoken over a tokenizer.json's own merges and pattern."""

    encoding: Any
    ids: np.ndarray
    """int64 (ranks,): tokenizer.json's id of each rank; -1 for bytes that it does not know and leaves out."""
    widths: np.ndarray
    """int64 (ranks,): bytes of each rank."""

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """int64 (tokens,) twice: ids, and the byte of the UTF-8 text at which each token ends."""
        ranks = np.array(self.encoding.encode_ordinary(text), dtype=np.int64)
        ids, ends = self.ids[ranks], np.cumsum(self.widths[ranks])
        known = ids >= 0
        return (ids, ends) if known.all() else (ids[known], ends[known])


def open_bulk_encoder(document: dict[str, Any], tokenizer: Tokenizer) -> BulkEncoder | None:
    """The faster encoder of a tokenizer.json, or None where it cannot be had or gives other ids.

    `document` is the description that `tokenizer` was built from. Whether the two agree is not assumed:
    every token must come back whole when it stands alone, and the bundled sample, hard cases and thousands
    of random strings of the vocabulary's own tokens must encode alike.
    """
    pattern = splitting_pattern(document)
    if pattern is None or not has_plain_merges(document):
        return None
    try:
        import tiktoken
    except ImportError:
        return None
    ranks = rank_merges(document["model"]["merges"])
    if ranks is None:
        return None
    vocabulary = document["model"]["vocab"]
    to_letter = byte_letters()
    ids = [vocabulary.get("".join(to_letter[byte] for byte in word), -1) for word in ranks]
    bulk = BulkEncoder(
        tiktoken.Encoding("bulk", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}),
        np.array(ids, dtype=np.int64),
        np.array([len(word) for word in ranks], dtype=np.int64),
    )
    return bulk if agrees(bulk, document, tokenizer, list(ranks)) else None


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


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def agrees(bulk: BulkEncoder, document: dict[str, Any], tokenizer: Tokenizer, words: list[bytes]) -> bool:
    """Whether both encoders give the same ids for everything that is tried."""
    letters = byte_letters()
    alone = ("".join(letters[byte] for byte in word) for word, known in zip(words, bulk.ids >= 0, strict=True) if known)
    if not all(len(tokenizer.model.tokenize(word)) == 1 for word in alone):
        return False
    texts = [*_HARD_TEXTS, *sample_lines(), *fuzzed_texts(words)]
    expected = tokenizer.encode_batch(texts, add_special_tokens=False)
    return all(bulk.encode(text)[0].tolist() == each.ids for text, each in zip(texts, expected, strict=True))


def sample_lines() -> list[str]:
    """Every fourth row of the bundled text, as it lies in its files."""
    files = sorted(SAMPLE_DIR.glob("*/train.jsonl"))
    return [json.dumps(json.loads(line), ensure_ascii=False) for file in files for line in file.open(encoding="utf-8")][
        ::4
    ]


def fuzzed_texts(words: list[bytes]) -> list[str]:
    """Random strings of the vocabulary's own tokens."""
    rng = random.Random(0)
    joined = (b"".join(rng.choices(words, k=rng.randrange(2, 6))) for _ in range(_FUZZED_TEXTS))
    return [text.decode(errors="ignore") for text in joined]
