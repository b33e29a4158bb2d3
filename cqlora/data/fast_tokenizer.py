"""Faster libraries in place of `tokenizers` where much is encoded, used only where proven equal."""

import json
import random
import tempfile
from collections.abc import Callable
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cqlora.data.byte_level import piece_bytes
from cqlora.data.sources.location import SAMPLE_DIR
from cqlora.data.text_tokens import StockTokens

_FUZZED_TEXTS = 4000
_CHINESE_TEXTS = 1000
_HAN = [chr(point) for low, high in ((0x3400, 0x4DB5), (0x4E00, 0x9FA5)) for point in range(low, high + 1)]
_BESIDE_CHINESE = list("，。、“”（）《》：？aA1 é\n　𠀀")
_NONCHARACTER = "\U0010ffff"
_HARD_TEXTS = [
    "", " ", "  a", "a  ", "\n\n a\r\n\t b", "a 1 22  333\n4", "don't I'LL we've", "x\x04y\x00\x7f",
    "\u200b\ufeff", "𠀀𪚥😀👨‍👩‍👧", "é e\u0301", "１２３，。！？", "Ⅷ ½ ²", "\u3000全角　空格", "▁ a▁b",
    "<|im_end|><|im_start|><|endoftext|>", "</s><s> <unk>", "a<|no control token|> b",
]  # fmt: skip


class FastTokens:
    """The tokens of many texts; see TextTokens."""

    def __init__(self, tokenizer: "FastTokenizer", texts: list[str], ids: np.ndarray, offsets: np.ndarray) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self.ids = ids
        self.offsets = offsets

    def character_ends(self, number: int, tokens: list[int]) -> list[int]:
        """See TextTokens."""
        byte_ends = self._byte_ends(number)
        if byte_ends is None:
            return self._stock(number).character_ends(0, tokens)
        begins = (np.frombuffer(self._texts[number].encode(), dtype=np.uint8) & 0xC0) != 0x80
        ends = byte_ends[tokens].tolist()
        return list(accumulate(int(np.count_nonzero(begins[start:end])) for start, end in pairwise([0, *ends])))

    def count_over(self, number: int, marked: np.ndarray) -> int:
        """See TextTokens."""
        ends = self._byte_ends(number)
        if ends is None:
            return self._stock(number).count_over(0, marked)
        starts = np.maximum(ends - self._tokenizer.widths[self._ids_of(number)], 0)
        before = np.cumsum(np.repeat(marked, [len(character.encode()) for character in self._texts[number]]))
        before = np.concatenate([[0], before])
        return int(np.count_nonzero(before[ends] > before[starts]))

    def _byte_ends(self, number: int) -> np.ndarray | None:
        """int64 (tokens,): the byte of a text's UTF-8 at which each of its tokens ends.

        None where the tokens do not spell the text, as when the vocabulary lacks one of its bytes.
        """
        ends = np.cumsum(self._tokenizer.widths[self._ids_of(number)], dtype=np.int64)
        # As `tokenizers` has it, a space put before a text belongs to its first character.
        unwritten = int(ends[-1]) - len(self._texts[number].encode()) if len(ends) else 0
        return np.maximum(ends - unwritten, unwritten) if unwritten in (0, 1) else None

    def _ids_of(self, number: int) -> np.ndarray:
        return self.ids[int(self.offsets[number]) : int(self.offsets[number + 1])]

    def _stock(self, number: int) -> StockTokens:
        encoding = self._tokenizer.stock.encode(self._texts[number], add_special_tokens=False)
        return StockTokens([encoding], self.ids.dtype)


class FastTokenizer:
    """Texts to ids by the library that is fastest at this kind of vocabulary, control names split like any text.

    Raises:
        ImportError: the library is not installed.
        ValueError: it cannot read this tokenizer.json.
    """

    def __init__(self, document: dict[str, Any], stock: Tokenizer, dtype: np.dtype[Any]) -> None:
        """`document` is tokenizer.json with every control token flagged special; `stock` was built from it."""
        open_library = open_tokie if is_byte_level(document) else open_fastokens
        self._encode = open_library(json.dumps(hide_controls(document)))
        self._dtype = dtype
        self.stock = stock
        self.words = spell_tokens(document)
        """Bytes of text under each id, empty for an id that no text yields."""
        self.controls = [token["content"] for token in document.get("added_tokens") or [] if token["special"]]
        self.widths = np.array([len(word) for word in self.words], dtype=np.int64)

    def encode(self, texts: list[str]) -> FastTokens:
        """The tokens of texts."""
        ids, offsets = self._encode(texts)
        return FastTokens(self, texts, ids.astype(self._dtype), offsets)


FlatEncoder = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
"""Texts to ids (tokens,), text after text, and where each text's begin (texts + 1,)."""


def open_fastokens(document: str) -> FlatEncoder:
    """The faster one on SentencePiece vocabularies (docs/data.md has the figures)."""
    import fastokens

    tokenizer = fastokens.Tokenizer.from_json_str(document)

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = tokenizer.encode_batch_flat(texts)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8")

    return encode


def open_tokie(document: str) -> FlatEncoder:
    """The faster one on byte-level vocabularies."""
    import tokie

    # tokie reads only files.
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(document)
        file.flush()
        tokenizer = tokie.Tokenizer.from_json(file.name)

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = np.fromiter(chain.from_iterable(each.ids for each in encodings), dtype=np.uint32)
        return ids, np.cumsum([0, *map(len, encodings)])

    return encode


def is_byte_level(document: dict[str, Any]) -> bool:
    """Whether a tokenizer.json splits text into bytes, as GPT-2's and Llama 3's do."""
    return '"ByteLevel"' in json.dumps(document.get("pre_tokenizer"))


def hide_controls(document: dict[str, Any]) -> dict[str, Any]:
    """The description with control tokens under names that no text holds.

    fastokens otherwise reads the word `</s>` as the control token where few merges compete for its letters, and tokie
    every control token's name.
    """
    controls = {token["content"] for token in document.get("added_tokens") or [] if token["special"]}
    hidden = {name: f"{_NONCHARACTER}{name}" for name in controls}
    model = document["model"]
    vocabulary = {hidden.get(piece, piece): token for piece, token in model["vocab"].items()}
    added = [token for token in document.get("added_tokens") or [] if not token["special"]]
    unknown = hidden.get(model.get("unk_token"), model.get("unk_token"))
    return {
        **document,
        "added_tokens": added,
        "post_processor": None,
        "model": {**model, "vocab": vocabulary, "unk_token": unknown},
    }


def spell_tokens(document: dict[str, Any]) -> list[bytes]:
    """The bytes of text under each id of a byte-level or SentencePiece vocabulary."""
    vocabulary: dict[str, int] = document["model"]["vocab"]
    matched = {token["id"]: token["content"] for token in document.get("added_tokens") or [] if not token["special"]}
    byte_level = is_byte_level(document)
    words = [b""] * (max([*vocabulary.values(), *matched], default=-1) + 1)
    for piece, token in vocabulary.items():
        words[token] = piece_bytes(piece, byte_level)
    for token, text in matched.items():
        words[token] = text.encode()
    return words


def agrees(fast: FastTokenizer) -> bool:
    """Whether it and the stock tokenizer give the same ids, ending at the same characters, for all that is tried.

    The bundled sample, hard cases, every control token's name, and thousands of random strings of the vocabulary's
    own words and of Chinese characters.
    """
    named = [f"a{name}{name} b" for name in fast.controls]
    texts = [*_HARD_TEXTS, *named, *sample_lines(), *fuzzed_texts(fast.words), *chinese_texts()]
    expected = fast.stock.encode_batch(texts, add_special_tokens=False)
    found = fast.encode(texts)
    ids = np.fromiter(chain.from_iterable(each.ids for each in expected), dtype=found.ids.dtype)
    offsets = np.cumsum([0, *(len(each.ids) for each in expected)])
    return (
        np.array_equal(found.ids, ids)
        and np.array_equal(found.offsets, offsets)
        and all(
            found.character_ends(number, list(range(len(each.ids)))) == [end for _, end in each.offsets]
            for number, each in enumerate(expected)
        )
    )


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


def chinese_texts() -> list[str]:
    """Random strings of any Chinese characters and of what stands beside them."""
    rng = random.Random(0)
    alphabet = [*_HAN, *_BESIDE_CHINESE * (len(_HAN) // 50)]
    return ["".join(rng.choices(alphabet, k=rng.randrange(1, 20))) for _ in range(_CHINESE_TEXTS)]
