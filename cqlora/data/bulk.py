"""A second, several times faster encoder, used only where it gives the same ids as the tokenizer itself."""

import json
import random
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from cqlora.data.bulk_bytes import open_byte_encoder
from cqlora.data.bulk_pieces import open_piece_encoder
from cqlora.data.sources.location import SAMPLE_DIR

_FUZZED_TEXTS = 4000
_HARD_TEXTS = [
    "", " ", "  a", "a  ", "\n\n a\r\n\t b", "a 1 22  333\n4", "don't I'LL we've", "x\x04y\x00\x7f",
    "\u200b\ufeff", "𠀀𪚥😀👨‍👩‍👧", "é e\u0301", "１２３，。！？", "Ⅷ ½ ²", "\u3000全角　空格",
    "<|im_end|><|im_start|><|endoftext|>", "a<|no control token|> b",
]  # fmt: skip


class BulkEncoder(Protocol):
    """What both kinds of faster encoder do."""

    @property
    def texts(self) -> list[bytes]:
        """UTF-8 of what the vocabulary can say, one word after another."""

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """int64 (tokens,) twice: ids, and the byte of the UTF-8 text at which each token ends."""


def open_bulk_encoder(document: dict[str, Any], tokenizer: Tokenizer) -> BulkEncoder | None:
    """The faster encoder of a tokenizer.json, or None where it cannot be had or gives other ids.

    `document` is the description that `tokenizer` was built from. Whether the two agree is not assumed: the
    bundled sample, hard cases and thousands of random strings of the vocabulary's own words must encode alike.
    """
    try:
        bulk = open_byte_encoder(document, tokenizer) or open_piece_encoder(document, tokenizer)
    except ImportError:
        return None
    return bulk if bulk is not None and agrees(bulk, tokenizer) else None


def agrees(bulk: BulkEncoder, tokenizer: Tokenizer) -> bool:
    """Whether both encoders give the same ids for everything that is tried."""
    texts = [*_HARD_TEXTS, *sample_lines(), *fuzzed_texts(bulk.texts)]
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
