"""Ids to text: what `tokenizers` decodes, a whole character at a time, and nothing of a stop string."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from cqlora.errors import ModelError
from cqlora.inference.text import ReplyText, TokenBytes

HARD = "Hello  world\n你好，长江 𠀀😀 don't�x"


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """A tokenizer of LLaMA's kind: pieces of a few words, bytes for the rest."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁world", "你", "好", "l", "o"]
    model = models.BPE(
        vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>",
        ignore_merges=True,
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def grow(folder, ids, stop=()) -> tuple[list[str], ReplyText]:
    reply = ReplyText(TokenBytes(folder), stop)
    return [reply.add(token) for token in ids], reply


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_the_pieces_together_are_the_text(kind, base, sentencepiece):
    folder = base if kind == "byte-level" else sentencepiece
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(HARD, add_special_tokens=False).ids
    pieces, _ = grow(folder, ids)
    assert "".join(pieces) == HARD
    # The first space of a text is SentencePiece's own, and a reply is no beginning of a text.
    assert "".join(pieces).lstrip(" ") == tokenizer.decode(ids).lstrip(" ")


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_only_whole_characters_are_shown(kind, base, sentencepiece):
    folder = base if kind == "byte-level" else sentencepiece
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode("😀", add_special_tokens=False).ids
    assert len(ids) == 4
    pieces, reply = grow(folder, ids)
    assert pieces == ["", "", "", "😀"]
    pieces, reply = grow(folder, ids[:3])
    assert pieces == ["", "", ""] and reply.finish() == ""


def test_control_tokens_and_rows_without_a_token_show_nothing(base):
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    control = [tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|endoftext|>")]
    pieces, _ = grow(base, [*control, tokenizer.get_vocab_size() + 3])
    assert pieces == ["", "", ""]


def test_stop_strings_are_cut_though_they_come_over_several_tokens(base):
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    ids = tokenizer.encode("one STOP two", add_special_tokens=False).ids
    pieces, reply = grow(base, ids, stop=("nothing", "STOP"))
    assert "".join(pieces) == "one " and reply.stopped and reply.finish() == ""
    pieces, reply = grow(base, tokenizer.encode("one STO", add_special_tokens=False).ids, stop=("STOP",))
    assert "".join(pieces) == "one " and not reply.stopped
    assert reply.finish() == "STO", "what only began like a stop string belongs to the reply"


def test_the_earliest_of_two_stop_strings_counts(base):
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    pieces, _ = grow(base, tokenizer.encode("a\n\nb c", add_special_tokens=False).ids, stop=("c", "\n\n"))
    assert "".join(pieces) == "a"


def test_another_kind_of_tokenizer_is_refused_in_a_sentence(tmp_path):
    document = {"decoder": {"type": "WordPiece"}, "model": {"vocab": {}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match="WordPiece"):
        TokenBytes(tmp_path)
