"""tokie or fastokens is used where it gives the ids of `tokenizers`, ending at the same characters, only there."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from cqlora.base import Base, read_base
from cqlora.data.encode import EncodeSettings, RecordEncoder
from cqlora.data.fast_tokenizer import FastTokenizer, agrees
from cqlora.data.records import Conversation, Document, Turn
from cqlora.data.tokenizer import PlainTokenizer
from tests.data.conftest import sample_texts, write_base
from tests.vocab.bases import write_base as write_converted

pytest.importorskip("fastokens", reason="fastokens is in the extra `data`")
pytest.importorskip("tokie", reason="tokie is in the extra `data`")

TEXTS = [
    "",
    " two  spaces ",
    "长江 eleven\n\n省",
    "<|im_end|>x</s><|im_start|>",
    "𠀀😀é\x00\x04",
    "a" * 3000,
    " " * 999,
]


@pytest.fixture(scope="module", params=["pieces", "ranks"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A base as `cqlora convert` makes it: SentencePiece, byte-level BPE."""
    return read_base(write_converted(tmp_path_factory.mktemp("converted") / request.param, request.param))


def same_ids(base: Base) -> bool:
    """Whether a base's tokenizer is proven."""
    return PlainTokenizer(base.path).prove_fast()


def test_tokenizers_as_convert_writes_them_are_proven(converted: Base):
    assert same_ids(converted)


def test_a_control_tokens_name_in_a_text_is_text(converted: Base):
    names = PlainTokenizer(converted.path).fast_text.controls
    fast = PlainTokenizer(converted.path, fast=True)
    controls = {token for name in names if (token := fast.text.token_to_id(name)) is not None}
    assert controls and not controls & set(fast.encode_texts([f"{name}M" for name in names]).ids.tolist())


def test_ids_and_character_ends_are_those_of_tokenizers(converted: Base):
    texts = [*TEXTS, *sample_texts()]
    stock, fast = PlainTokenizer(converted.path), PlainTokenizer(converted.path, fast=True)
    expected = stock.text.encode_batch(texts, add_special_tokens=False)
    found = fast.encode_texts(texts)
    assert found.ids.dtype == stock.dtype
    for number, encoding in enumerate(expected):
        assert found.ids[int(found.offsets[number]) : int(found.offsets[number + 1])].tolist() == encoding.ids
        assert found.character_ends(number, list(range(len(encoding)))) == [end for _, end in encoding.offsets]
    assert fast.encode_segments(texts) == stock.encode_segments(texts)


def test_tokens_over_marked_characters_are_counted_alike(converted: Base):
    texts = [*sample_texts()[::9], "\x00长江\x04"]
    stock = PlainTokenizer(converted.path).encode_texts(texts)
    fast = PlainTokenizer(converted.path, fast=True).encode_texts(texts)
    for number, text in enumerate(texts):
        marked = np.array(["一" <= character <= "龥" for character in text])
        assert fast.count_over(number, marked) == stock.count_over(number, marked) > 0 or not marked.any()


def test_pieces_are_the_same_either_way(byte_base: Base):
    talk = Conversation([Turn("system", "简短"), Turn("user", "长江有多长？" * 40), Turn("assistant", "6,300 km.")])
    records = [*map(Document, sample_texts()[::7]), talk, Document("a\x04b" * 100)]
    for all_tokens in (True, False):
        batches = [
            RecordEncoder(EncodeSettings(str(byte_base.path), 61, all_tokens, fast=fast)).encode(records, measured=9)
            for fast in (False, True)
        ]
        for name in ("tokens", "labels", "lengths", "characters", "utf8_bytes", "records", "han_tokens", "counts"):
            np.testing.assert_equal(getattr(batches[1], name), getattr(batches[0], name), err_msg=name)


@pytest.mark.parametrize("change", ["merges", "ids"])
def test_a_tokenizer_that_gives_other_ids_is_not_proven(byte_base: Base, change: str):
    document: dict[str, Any] = json.loads(byte_base.tokenizer_file.read_text("utf-8"))
    stock = Tokenizer.from_str(json.dumps(document))
    stock.encode_special_tokens = True
    assert agrees(FastTokenizer(document, stock, np.dtype(np.uint16)))
    if change == "merges":
        document["model"]["merges"] = document["model"]["merges"][:-200]
    else:
        vocabulary = document["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    assert not agrees(FastTokenizer(document, stock, np.dtype(np.uint16)))


def test_a_tokenizer_that_the_library_cannot_read_is_left_to_tokenizers(tmp_path: Path, byte_base: Base):
    tokenizer = Tokenizer.from_file(str(byte_base.tokenizer_file))
    tokenizer.normalizer = normalizers.StripAccents()
    odd = write_base(tmp_path / "odd", tokenizer, "<|endoftext|>", "<|endoftext|>")
    assert not same_ids(odd) or agrees(PlainTokenizer(odd.path).fast_text)
    assert PlainTokenizer(odd.path).encode_texts(["é"]).ids.tolist() == tokenizer.encode("é").ids


LIBRARIES = {"pieces": "fastokens", "ranks": "tokie"}


def test_without_its_library_nothing_is_proven_and_nothing_fails(converted: Base, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, LIBRARIES[converted.path.name], None)
    assert not same_ids(converted)


def test_a_kind_of_vocabulary_needs_one_library_alone(converted: Base, monkeypatch: pytest.MonkeyPatch):
    for other in set(LIBRARIES.values()) - {LIBRARIES[converted.path.name]}:
        monkeypatch.setitem(sys.modules, other, None)
    assert same_ids(converted)
