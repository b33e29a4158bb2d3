"""Checks that a merged tokenizer must pass before it is kept; a failure is an error."""

from collections.abc import Iterable, Sequence

import sentencepiece
from tokenizers import Tokenizer

from cqlora.errors import ModelError
from cqlora.vocab.files import TokenizerFiles

PROBES = (
    "中文分词：今天天气不错，我们去公园散步吧。",
    "繁體字與简体字、全角（ＡＢＣ１２３）、标点——“引号”……",
    "The quick brown fox doesn't jump over 12,345.67 lazy dogs.",
    "def f(x):\n\treturn {k: v for k, v in x.items() if v != 0}  # 注释\n",
    "  two leading spaces, trailing too  ",
    "\n\n\nnewlines\r\n\ttabs\n ",
    "emoji 😀👩‍👩‍👧‍👦🇨🇳 and ﷺ ½ ® é e\u0301",
    "rare 𠮷𡃁㐂 龘靐齉 ﾊﾝｶｸ ꙮ \u200b\ufeff",
    "English 与中文 mixed在一起with no 空格 and with",
    "https://example.org/路径?q=中文&x=1#锚",
)


def check_parity(files: TokenizerFiles, tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Check that the tokenizer gives SentencePiece's ids, where it is one, and decodes to what it read; count texts.

    Raises:
        ModelError: the first text that is not encoded or decoded right.
    """
    processor = None
    if files.pieces is not None:
        processor = sentencepiece.SentencePieceProcessor(model_proto=files.pieces.SerializeToString())
    # As Qwen's does; any other change of a text would lose some of it.
    brings_to_nfc = files.document.get("normalizer") == {"type": "NFC"}
    checked = (*PROBES, *texts)
    for text in checked:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if processor is not None and (expected := processor.encode(text)) != ids:
            place = _first_difference(expected, ids)
            raise ModelError(
                f"the merged tokenizer differs from SentencePiece at token {place} of {text[:40]!r}: "
                f"{tokenizer.decode(ids[max(0, place - 2) : place + 3])!r}; the vocabulary was not kept."
            )
        read = tokenizer.normalizer.normalize_str(text) if brings_to_nfc else text
        if (decoded := tokenizer.decode(ids, skip_special_tokens=False)) != read:
            place = _first_difference(decoded, read)
            raise ModelError(
                f"the merged tokenizer gives back {decoded[max(0, place - 10) : place + 10]!r} for "
                f"{read[max(0, place - 10) : place + 10]!r}; the vocabulary was not kept."
            )
    return len(checked)


def share_changed(before: Tokenizer, after: Tokenizer, texts: Sequence[str]) -> float:
    """Share of the texts' tokens before that a new segmentation replaced."""
    total = changed = 0
    for text in texts:
        old = before.encode(text, add_special_tokens=False)
        new = set(after.encode(text, add_special_tokens=False).offsets)
        total += len(old.ids)
        changed += sum(offsets not in new for offsets in old.offsets)
    return changed / max(1, total)


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
