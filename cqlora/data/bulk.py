"""A second, several times faster encoder, used only where it gives the same ids as the tokenizer itself."""

import json
import random
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cqlora.data.bulk_bytes import HAN, open_byte_encoder
from cqlora.data.bulk_encoder import BulkEncoder
from cqlora.data.bulk_pieces import open_piece_encoder
from cqlora.data.sources.location import SAMPLE_DIR

_FUZZED_TEXTS = 4000
_CHINESE_TEXTS = 1000
_BESIDE_CHINESE = list("，。、“”（）《》：？aA1 é\n　𠀀")
_HARD_TEXTS = [
    "", " ", "  a", "a  ", "\n\n a\r\n\t b", "a 1 22  333\n4", "don't I'LL we've", "x\x04y\x00\x7f",
    "\u200b\ufeff", "𠀀𪚥😀👨‍👩‍👧", "é e\u0301", "１２３，。！？", "Ⅷ ½ ²", "\u3000全角　空格",
    "<|im_end|><|im_start|><|endoftext|>", "a<|no control token|> b",
]  # fmt: skip


def open_bulk_encoder(document: dict[str, Any], tokenizer: Tokenizer, dtype: np.dtype[Any]) -> BulkEncoder | None:
    """The faster encoder of a tokenizer.json, or None where it cannot be had.

    `document` is the description that `tokenizer` was built from. Whether the two agree is for `agrees` to say.
    """
    try:
        return open_byte_encoder(document, tokenizer, dtype) or open_piece_encoder(document, tokenizer, dtype)
    except ImportError:
        return None


def agrees(bulk: BulkEncoder, tokenizer: Tokenizer) -> bool:
    """Whether both encoders give the same ids for everything that is tried.

    The bundled sample, hard cases, and thousands of random strings of the vocabulary's own words and of Chinese
    characters must encode alike.
    """
    tried = [*_HARD_TEXTS, *sample_lines(), *fuzzed_texts(bulk.words), *chinese_texts()]
    texts = [text for text in tried if bulk.takes([text])]
    expected = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    found = bulk.encode(texts)
    ids = np.fromiter(chain.from_iterable(each.ids for each in expected), dtype=found.ids.dtype)
    offsets = np.cumsum([0, *(len(each.ids) for each in expected)])
    return np.array_equal(found.ids, ids) and np.array_equal(found.offsets, offsets)


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
    alphabet = [*HAN, *_BESIDE_CHINESE * (len(HAN) // 50)]
    return ["".join(rng.choices(alphabet, k=rng.randrange(1, 20))) for _ in range(_CHINESE_TEXTS)]
