"""The faster encoder: the same ids, pieces and characters, or none at all."""

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cqlora.base import Base
from cqlora.data import bulk
from cqlora.data.bulk import byte_letters, open_bulk_encoder, rank_merges, splitting_pattern
from cqlora.data.encode import EncodeSettings, RecordEncoder
from cqlora.data.records import Conversation, Document, Turn
from tests.data.conftest import sample_texts

pytest.importorskip("tiktoken")


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    return document


def splits() -> dict[str, Any]:
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    from tokenizers import Regex

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "gpt2": plain,
        "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama3": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(llama3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "llama3"])
def test_ids_and_ends_are_those_of_tokenizers(byte_base: Base, name: str):
    tokenizer = Tokenizer.from_file(str(byte_base.tokenizer_file))
    tokenizer.pre_tokenizer = splits()[name]
    tokenizer.encode_special_tokens = True
    encoder = open_bulk_encoder(describe(tokenizer), tokenizer)
    assert encoder is not None
    for text in [*sample_texts()[::7], "  12 34\n\n  x１２ <|im_end|> I'll\t\n", "a\x00\x04b"]:
        ids, ends = encoder.encode(text)
        assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
        assert not len(ends) or ends[-1] == len(text.encode())


def test_pieces_are_the_same_in_bulk(byte_base: Base):
    records = [Document(text) for text in sample_texts()[::9]]
    records += [
        Conversation([Turn("user", text[:50].strip()), Turn("assistant", text)]) for text in sample_texts()[::11]
    ]
    for all_tokens in (True, False):
        encoder = RecordEncoder(EncodeSettings(str(byte_base.path), 64, all_tokens))
        assert encoder.tokenizer.bulk is not None
        stock, fast = (encoder.encode(records, 5, in_bulk) for in_bulk in (False, True))
        for name in ("tokens", "labels", "lengths", "label_tokens", "characters", "utf8_bytes", "records"):
            assert np.array_equal(getattr(stock, name), getattr(fast, name)), name
        assert stock.counts == fast.counts


def test_bytes_that_the_vocabulary_lacks_are_left_out_alike(byte_base: Base):
    tokenizer = Tokenizer.from_file(str(byte_base.tokenizer_file))
    document = describe(tokenizer)
    missing = byte_letters()[4]
    document["model"]["vocab"]["kept as a number"] = document["model"]["vocab"].pop(missing)
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.encode_special_tokens = True
    encoder = open_bulk_encoder(document, tokenizer)
    assert encoder is not None
    ids, ends = encoder.encode("ab\x04c")
    assert ids.tolist() == tokenizer.encode("ab\x04c").ids
    assert ends[-1] == 4


def test_a_tokenizer_that_splits_or_merges_otherwise_has_none(byte_base: Base, llama_base: Base):
    tokenizer = Tokenizer.from_file(str(llama_base.tokenizer_file))
    assert open_bulk_encoder(describe(tokenizer), tokenizer) is None
    tokenizer = Tokenizer.from_file(str(byte_base.tokenizer_file))
    odd = describe(tokenizer)
    odd["pre_tokenizer"] = {"type": "Whitespace"}
    assert splitting_pattern(odd) is None
    prefixed = describe(tokenizer)
    prefixed["model"]["continuing_subword_prefix"] = "##"
    assert open_bulk_encoder(prefixed, tokenizer) is None
    assert rank_merges([["a", "b"], ["c", "d"], ["a", "b"]]) is None


def test_disagreement_is_noticed(byte_base: Base, monkeypatch: pytest.MonkeyPatch):
    tokenizer = Tokenizer.from_file(str(byte_base.tokenizer_file))
    tokenizer.encode_special_tokens = True
    assert open_bulk_encoder(describe(tokenizer), tokenizer) is not None
    monkeypatch.setattr(bulk, "_GPT2", r"\S+|\s+")
    assert open_bulk_encoder(describe(tokenizer), tokenizer) is None


def test_merges_that_tiktoken_would_add_are_noticed():
    """`abc` is made of a+bc alone; tiktoken would also make it of ab+c."""
    letters = byte_letters()
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    for word in ("ab", "bc", "abc"):
        vocabulary[word] = len(vocabulary)
    model = models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "c"), ("a", "bc")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert open_bulk_encoder(describe(tokenizer), tokenizer) is None
