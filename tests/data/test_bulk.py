"""The faster encoder: the same ids, pieces and characters, or none at all."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cqlora.base import Base
from cqlora.data import bulk_bytes, bulk_pieces
from cqlora.data.bulk import agrees, open_bulk_encoder
from cqlora.data.bulk_bytes import rank_merges, splitting_pattern
from cqlora.data.bulk_encoder import BulkEncoder
from cqlora.data.bulk_pieces import cutting_pattern, joined_letters, rank_pieces
from cqlora.data.byte_level import byte_letters
from cqlora.data.encode import EncodeSettings, RecordEncoder, SharedEncoder
from cqlora.data.language import han_characters
from cqlora.data.records import Conversation, Document, Turn
from cqlora.data.tokenizer import PlainTokenizer
from tests.data.conftest import sample_texts
from tests.vocab.bases import write_base

pytest.importorskip("tiktoken")


def open_proven(document: dict[str, Any], tokenizer: Tokenizer) -> BulkEncoder | None:
    bulk = open_bulk_encoder(document, tokenizer, np.dtype(np.uint16))
    return bulk if bulk is not None and agrees(bulk, tokenizer) else None


def encode(bulk: BulkEncoder, text: str) -> tuple[list[int], list[int]]:
    tokens = bulk.encode([text])
    return tokens.ids.tolist(), tokens.byte_ends(0).tolist()


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
    encoder = open_proven(describe(tokenizer), tokenizer)
    assert encoder is not None
    for text in [*sample_texts()[::7], "  12 34\n\n  x１２ <|im_end|> I'll\t\n", "a\x00\x04b"]:
        ids, ends = encode(encoder, text)
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids
        assert not ends or ends[-1] == len(text.encode())


def test_pieces_are_the_same_in_bulk(byte_base: Base):
    records = [Document(text) for text in sample_texts()[::9]]
    records += [
        Conversation([Turn("user", text[:50].strip()), Turn("assistant", text)]) for text in sample_texts()[::11]
    ]
    for all_tokens in (True, False):
        encoder = RecordEncoder(EncodeSettings(str(byte_base.path), 64, all_tokens))
        assert encoder.tokenizer.prove_bulk()
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
    encoder = open_proven(document, tokenizer)
    assert encoder is not None
    ids, ends = encode(encoder, "ab\x04c")
    assert ids == tokenizer.encode("ab\x04c").ids
    assert ends[-1] == 4


def test_a_tokenizer_that_splits_or_merges_otherwise_has_none(byte_base: Base, llama_base: Base):
    tokenizer = Tokenizer.from_file(str(llama_base.tokenizer_file))
    assert open_proven(describe(tokenizer), tokenizer) is None
    tokenizer = Tokenizer.from_file(str(byte_base.tokenizer_file))
    odd = describe(tokenizer)
    odd["pre_tokenizer"] = {"type": "Whitespace"}
    assert splitting_pattern(odd) is None
    prefixed = describe(tokenizer)
    prefixed["model"]["continuing_subword_prefix"] = "##"
    assert open_proven(prefixed, tokenizer) is None
    assert rank_merges([["a", "b"], ["c", "d"], ["a", "b"]]) is None


def test_disagreement_is_noticed(byte_base: Base, monkeypatch: pytest.MonkeyPatch):
    tokenizer = Tokenizer.from_file(str(byte_base.tokenizer_file))
    tokenizer.encode_special_tokens = True
    assert open_proven(describe(tokenizer), tokenizer) is not None
    monkeypatch.setattr(bulk_bytes, "_GPT2", r"\S+|\s+")
    assert open_proven(describe(tokenizer), tokenizer) is None


def test_merges_that_tiktoken_would_add_are_noticed():
    """`abc` is made of a+bc alone; tiktoken would also make it of ab+c."""
    letters = byte_letters()
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    for word in ("ab", "bc", "abc"):
        vocabulary[word] = len(vocabulary)
    model = models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "c"), ("a", "bc")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert open_proven(describe(tokenizer), tokenizer) is None


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A converted SentencePiece BPE with byte fallback."""
    folder = write_base(tmp_path_factory.mktemp("pieces") / "base", "pieces")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def test_pieces_and_their_ends_are_those_of_tokenizers(pieces: Tokenizer):
    encoder = open_proven(describe(pieces), pieces)
    assert encoder is not None
    texts = [*sample_texts()[::7], "  12 34\n\n  x１２ <|im_end|> I'll\t\n", "𠮷a\x00😀 é", " ", ""]
    for text in texts:
        ids, ends = encode(encoder, text)
        expected = pieces.encode(text, add_special_tokens=False)
        assert ids == expected.ids, text
        assert not ends or ends[-1] == len(text.encode())
        for end, (_, character) in zip(ends, expected.offsets, strict=True):
            # A token inside a character ends where its own byte does, `tokenizers` says where the character does.
            assert len(text.encode()[:end].decode(errors="ignore")) in (character, character - 1)


def test_a_long_stretch_without_spaces_is_encoded_alike(pieces: Tokenizer):
    encoder = open_proven(describe(pieces), pieces)
    assert encoder is not None
    for text in ("人工智能" * 3000, "aaaa" * 3000, " " * 5000, "\n" * 3000):
        assert encode(encoder, text)[0] == pieces.encode(text, add_special_tokens=False).ids


def test_pieces_that_cross_a_space_or_have_two_ranks_have_no_faster_encoder(pieces: Tokenizer):
    assert rank_pieces([["a", "b"], ["c", "d"], ["a", "b"]]) is None
    assert rank_pieces([["a", "bc"], ["ab", "c"], ["c", "d"]]) == ["abc", "cd"]
    document = describe(pieces)
    document["model"]["vocab"]["a▁"] = len(document["model"]["vocab"])
    document["model"]["merges"].append(["a", "▁"])
    assert open_proven(document, Tokenizer.from_str(json.dumps(document))) is None


def test_text_is_cut_where_no_piece_reaches_across():
    pattern = cutting_pattern(joined_letters(["▁中国", "ab", "▁▁"]))
    assert re.findall(pattern, "▁中国中x，ab▁▁a▁") == ["▁中国中", "x", "，", "ab", "▁▁a", "▁"]


def test_disagreement_on_pieces_is_noticed(pieces: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bulk_pieces, "rank_bytes", lambda letters, ranked: bulk_pieces_reversed(ranked))
    assert open_proven(describe(pieces), pieces) is None


def bulk_pieces_reversed(ranked: list[str]) -> dict[bytes, int]:
    """Ranks with the pieces in the wrong order."""
    words = [bytes([byte]) for byte in range(256)] + [piece.encode() for piece in reversed(ranked)]
    return {word: rank for rank, word in enumerate(dict.fromkeys(words))}


LONE_TEXTS = [
    "汉", "汉字", "天地玄黄宇宙洪荒", "天地a玄黄 宇宙，洪荒。\n日月", " 天地", "天地 ", "a天b地c",
    "天地玄\u3000黄", "𠮷天𠮷地𠮷", "天地" * 4000, "龘" * 50, "，。！", "“天”", "①②", "\ue000天", "é天é",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["byte", "pieces"])
def test_stretches_of_lone_characters_are_spelled_and_put_back_where_they_stood(
    byte_base: Base, pieces: Tokenizer, kind: str
):
    tokenizer = pieces if kind == "pieces" else Tokenizer.from_file(str(byte_base.tokenizer_file))
    tokenizer.encode_special_tokens = True
    bulk = open_proven(describe(tokenizer), tokenizer)
    assert bulk is not None and bulk.lone is not None
    assert (bulk.lone.elements >= 0).sum() > 10_000
    tokens = bulk.encode(LONE_TEXTS)
    for number, text in enumerate(LONE_TEXTS):
        expected = tokenizer.encode(text, add_special_tokens=False)
        assert tokens.ids[slice(*tokens.offsets[number : number + 2])].tolist() == expected.ids, text
        assert tokens.byte_ends(number)[-1] == len(text.encode())
        inner = list(range(len(expected.ids)))
        assert tokens.character_ends(number, inner) == [end for _, end in expected.offsets], text


def test_characters_that_a_word_joins_are_not_lone():
    words = ["的人".encode(), b"\xe5\x9c", "国".encode() + b"\xe4\xb8", " 天".encode(), "天，".encode()]
    lone = bulk_bytes.lone_letters(words)
    assert not set("的人国") & set(lone)
    assert not [letter for letter in lone if letter.encode()[:2] == b"\xe4\xb8"]
    assert set("地天") <= set(lone)


def test_a_pattern_that_treats_some_letters_otherwise_gets_no_lone_ones():
    assert bulk_bytes.takes_letters_alike(bulk_bytes._GPT2)
    for pattern in (r"[\u4e00-\u9fa5]+|\p{L}+", r"\p{Han}+|\p{L}+", r"\p{L}{1,8}", "[一-龥]+|\\p{L}+"):
        assert not bulk_bytes.takes_letters_alike(pattern)


def test_a_text_that_holds_the_stand_in_is_left_to_the_tokenizer(byte_base: Base):
    plain = PlainTokenizer(byte_base.path)
    assert plain.prove_bulk() and plain.bulk is not None and plain.bulk.lone is not None
    text = f"天地{plain.bulk.lone.stand_in}玄黄"
    assert not plain.bulk.takes([text])
    assert plain.encode_texts([text], True).ids.tolist() == plain.text.encode(text, add_special_tokens=False).ids


def test_tokens_over_marked_characters_are_counted_alike(byte_base: Base):
    plain = PlainTokenizer(byte_base.path)
    for text in sample_texts()[::9]:
        marked = han_characters(text)
        stock, bulk = (plain.encode_texts(["x", text], in_bulk) for in_bulk in (False, True))
        assert stock.count_over(1, marked) == bulk.count_over(1, marked)


def test_an_encoder_reaches_another_process_by_its_file_and_needs_no_folder(tmp_path: Path, byte_base: Base):
    folder = tmp_path / "base"
    shutil.copytree(byte_base.path, folder)
    encoder = RecordEncoder(EncodeSettings(str(folder), 64, True))
    assert encoder.tokenizer.prove_bulk()
    shared = SharedEncoder(encoder, tmp_path / "encoder.pickle")
    documents = [Document(text) for text in sample_texts()[::9]]
    expected = encoder.encode(documents, 3, in_bulk=True)
    sent = pickle.dumps(shared)
    assert len(sent) < 1000
    shutil.rmtree(folder)
    found = pickle.loads(sent).encoder.encode(documents, 3, in_bulk=True)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert (found.han_tokens, found.han_characters) == (expected.han_tokens, expected.han_characters)
    shared.close()
    assert not list(tmp_path.iterdir())
