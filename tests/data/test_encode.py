"""Records to chunks: every token once, every character counted where it is learned."""

import random
import re

import numpy as np
import pytest

from cqlora.base import Base
from cqlora.data.chunks import EncodedBatch, cut_points
from cqlora.data.encode import EncodeSettings, RecordEncoder
from cqlora.data.records import Conversation, Document, Turn
from cqlora.data.tokenizer import PlainTokenizer
from tests.data.conftest import sample_texts


def encoder(base: Base, length: int, all_tokens: bool = True, system_prompt: str = "") -> RecordEncoder:
    return RecordEncoder(EncodeSettings(str(base.path), length, all_tokens, system_prompt))


def chunks_of(batch: EncodedBatch) -> list[tuple[list[int], list[int]]]:
    ends = np.cumsum(batch.lengths)[:-1]
    return [
        (ids.tolist(), labels.tolist())
        for ids, labels in zip(np.split(batch.tokens, ends), np.split(batch.labels, ends), strict=True)
    ]


def test_a_document_stands_between_its_start_and_end_token_and_all_but_the_first_are_labels(any_base: Base):
    plain = PlainTokenizer(any_base.path)
    text = "长江流经 eleven provinces."
    ((ids, labels),) = chunks_of(encoder(any_base, 512).encode([Document(text)]))
    assert ids[0] == plain.special.document_start
    assert ids[-1] == plain.special.document_end
    assert plain.text.decode(ids[1:-1]) == text
    assert labels == [0] + [1] * (len(ids) - 1)


def test_start_token_is_bos_or_else_end_of_text(tmp_path, byte_base: Base):
    from tokenizers import Tokenizer

    from tests.data.conftest import write_base

    tokenizer = Tokenizer.from_file(str(byte_base.tokenizer_file))
    without = PlainTokenizer(write_base(tmp_path / "none", tokenizer, None, "<|im_end|>").path).special
    assert without.bos is None
    assert without.document_start == without.document_end == tokenizer.token_to_id("<|endoftext|>")
    # SmolLM2-Instruct names the chat tokens as bos and eos; documents stand between end-of-text tokens.
    chat = PlainTokenizer(write_base(tmp_path / "chat", tokenizer, "<|im_start|>", "<|im_end|>").path).special
    assert chat == without


@pytest.mark.parametrize("length", [16, 61, 128])
def test_long_documents_are_cut_into_consecutive_pieces_and_nothing_is_dropped(any_base: Base, length: int):
    texts = sample_texts()[::20]
    whole = chunks_of(encoder(any_base, 1 << 20).encode([Document(text) for text in texts]))
    batch = encoder(any_base, length).encode([Document(text) for text in texts])
    chunks = chunks_of(batch)
    assert max(len(ids) for ids, _ in chunks) == length
    assert [token for ids, _ in chunks for token in ids] == [token for ids, _ in whole for token in ids]
    assert all(labels == [0] + [1] * (len(ids) - 1) for ids, labels in chunks)


def test_cut_points_leave_no_piece_of_one_token():
    for tokens in range(1, 60):
        cuts = cut_points(tokens, 8)
        assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])]
        assert cuts[-1][1] == tokens
        assert all(0 < b - a <= 8 for a, b in cuts)
        assert tokens == 1 or min(b - a for a, b in cuts) > 1


def test_characters_and_bytes_of_a_piece_are_those_of_its_label_tokens(byte_base: Base):
    """ASCII text, where a token's characters can be told from its decoding alone."""
    plain = PlainTokenizer(byte_base.path)
    text = "The river rises on the plateau; it is 6300 km long.\n" * 40
    batch = encoder(byte_base, 50).encode([Document(text)])
    for (ids, _), characters, utf8_bytes in zip(chunks_of(batch), batch.characters, batch.utf8_bytes, strict=True):
        assert characters == utf8_bytes == len(plain.text.decode(ids[1:], skip_special_tokens=True))


def test_characters_of_an_uncut_document_do_not_depend_on_the_vocabulary(byte_base: Base, llama_base: Base):
    documents = [Document(text) for text in sample_texts()[::10]]
    for base in (byte_base, llama_base):
        batch = encoder(base, 1 << 20).encode(documents)
        assert batch.characters.tolist() == [len(document.text) for document in documents]
        assert batch.utf8_bytes.tolist() == [len(document.text.encode()) for document in documents]


def test_cut_pieces_of_chinese_lose_only_the_characters_of_their_first_tokens(any_base: Base):
    text = next(text for text in sample_texts() if ord(text[0]) > 0x4E00) * 3
    plain = PlainTokenizer(any_base.path)
    spans = plain.text.encode(text, add_special_tokens=False).offsets
    batch = encoder(any_base, 32).encode([Document(text)])
    firsts = np.cumsum(batch.lengths)[:-1] - 1  # token numbers in the text: the start token is not of it
    ends = [0, *(end for _, end in spans)]
    context = sum(ends[first + 1] - ends[first] for first in firsts if first < len(spans))
    assert batch.characters.sum() == len(text) - context


def test_a_document_is_trained_whole_in_instruction_tuning(byte_base: Base):
    document = Document("河水 flows east.")
    of_sft, of_pretraining = (encoder(byte_base, 64, all_tokens).encode([document]) for all_tokens in (False, True))
    assert of_sft.tokens.tolist() == of_pretraining.tokens.tolist()
    assert of_sft.labels.tolist() == of_pretraining.labels.tolist()


def test_a_conversation_in_pretraining_is_template_text_with_every_token_a_label(byte_base: Base):
    turns = [Turn("user", "你好"), Turn("assistant", "hello")]
    ((ids, labels),) = chunks_of(encoder(byte_base, 64).encode([Conversation(turns)]))
    text = PlainTokenizer(byte_base.path).text.decode(ids, skip_special_tokens=False)
    expected = "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    assert text == f"<|endoftext|>{expected}<|endoftext|>"
    assert labels == [0] + [1] * (len(ids) - 1)


def test_system_prompt_comes_first_where_a_conversation_brings_none(byte_base: Base):
    plain = PlainTokenizer(byte_base.path)
    talk = [Turn("user", "q"), Turn("assistant", "a")]
    encode = encoder(byte_base, 256, all_tokens=False, system_prompt="Be brief.").encode
    without, with_own = (
        plain.text.decode(encode([Conversation(turns)]).tokens.tolist(), skip_special_tokens=False)
        for turns in (talk, [Turn("system", "Own."), *talk])
    )
    assert "<|im_start|>system\nBe brief.<|im_end|>" in without
    assert "Be brief" not in with_own
    assert "Own." in with_own


def long_conversation(seed: int) -> list[Turn]:
    rng = random.Random(seed)
    texts = sample_texts()
    turns = [Turn("system", "Answer well.")]
    for _ in range(8):
        turns.append(Turn("user", rng.choice(texts)[: rng.randrange(5, 60)].strip()))
        turns.append(Turn("assistant", rng.choice(texts)[: rng.randrange(5, 300)].strip()))
    return turns


@pytest.mark.parametrize("seed", range(5))
def test_long_conversations_are_cut_before_a_user_speaks_and_every_answer_is_kept(byte_base: Base, seed: int):
    plain = PlainTokenizer(byte_base.path)
    turns = long_conversation(seed)
    batch = encoder(byte_base, 700, all_tokens=False).encode([Conversation(turns)])
    chunks = chunks_of(batch)
    assert len(chunks) > 1
    assert batch.counts == {"conversations cut between turns": 1}
    trained = ""
    for ids, labels in chunks:
        text = plain.text.decode(ids, skip_special_tokens=False)
        assert text.startswith("<|endoftext|><|im_start|>system\nAnswer well.<|im_end|>\n<|im_start|>user\n")
        trained += plain.text.decode([token for token, label in zip(ids, labels, strict=True) if label])
    said = "".join(turn.text for turn in turns if turn.role == "assistant")
    assert trained == said
    assert batch.characters.sum() == len(said)
    assert batch.utf8_bytes.sum() == len(said.encode())


def test_in_pretraining_an_exchange_too_long_by_itself_is_cut_like_a_document(byte_base: Base):
    plain = PlainTokenizer(byte_base.path)
    answer = sample_texts()[-1]
    talk = [Turn("user", "Tell me."), Turn("assistant", answer)]
    whole = chunks_of(encoder(byte_base, 1 << 20).encode([Conversation(talk)]))[0]
    batch = encoder(byte_base, 64).encode([Conversation(talk)])
    chunks = chunks_of(batch)
    assert batch.counts["exchanges cut"] == 1
    assert [token for ids, _ in chunks for token in ids] == whole[0]
    starts = np.cumsum([0, *(len(ids) for ids, _ in chunks)])[:-1]
    labels = np.array(whole[1])
    labels[starts] = 0
    assert [label for _, chunk in chunks for label in chunk] == labels.tolist()
    lost = sum(len(plain.text.decode([ids[0]])) for ids, _ in chunks[1:])
    said = sum(len(f"{turn.role}\n{turn.text}") for turn in talk)
    assert batch.characters.sum() == said - lost


def shorten(base: Base, length: int, *turns: tuple[str, str]) -> tuple[str, str, EncodedBatch]:
    """(context, what is trained, the batch) of the one chunk that a conversation gives."""
    plain = PlainTokenizer(base.path)
    batch = encoder(base, length, all_tokens=False).encode([Conversation([Turn(*turn) for turn in turns])])
    ((ids, labels),) = chunks_of(batch)
    assert len(ids) <= length
    first = labels.index(1)
    assert all(labels[first : len(ids) if labels[-1] else labels.index(1) + sum(labels)])
    parts = [plain.text.decode(part, skip_special_tokens=False) for part in (ids[:first], ids[first:])]
    # The oldest kind of tokenizer decodes a space after each control token.
    context, trained = (part.replace("|> ", "|>") for part in parts)
    return context.removeprefix(plain.text.decode(ids[:1], skip_special_tokens=False)), trained, batch


def test_a_question_too_long_loses_its_beginning_and_the_reply_stays_whole(any_base: Base):
    question = "、".join(f"第{n}个长江问题" for n in range(200)) + "，最后呢？"
    context, trained, batch = shorten(any_base, 96, ("system", "简短。"), ("user", question), ("assistant", "很长。"))
    system, user, words = re.fullmatch(
        r"(.*)<\|im_start\|>(user)\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n", context, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    assert "简短。<|im_end|>" in system
    assert (user, question.endswith(words), "最后呢？" in words) == ("user", True, True)
    assert trained == "很长。<|im_end|>\n"
    assert batch.counts == {"questions cut at their beginning": 1}
    assert (batch.characters.tolist(), batch.utf8_bytes.tolist()) == ([3], [9])


def test_a_reply_too_long_ends_early_after_its_question(any_base: Base):
    answer = "\n".join(sample_texts()[:20])
    context, trained, batch = shorten(any_base, 96, ("user", "长江？"), ("assistant", answer))
    assert "user\n长江？<|im_end|>\n" in context
    assert answer.startswith(trained.rstrip("\ufffd"))
    assert batch.lengths.tolist() == [96]
    assert batch.counts == {"replies cut at their end": 1}
    assert len(trained.rstrip("\ufffd")) <= batch.characters.sum() <= len(trained)


def test_question_and_reply_too_long_share_the_sequence(byte_base: Base):
    question, answer = "、".join(map(str, range(900))), "\n".join(sample_texts()[:20])
    context, _, batch = shorten(byte_base, 200, ("user", question), ("assistant", answer))
    assert batch.counts == {"questions cut at their beginning": 1, "replies cut at their end": 1}
    assert "898、899<|im_end|>" in context
    assert 0.7 < batch.label_tokens.sum() / 200 <= 0.75


def test_a_system_message_that_leaves_no_room_for_the_question_is_left_out(byte_base: Base):
    turns = ("system", "rules " * 100), ("user", "q"), ("assistant", "a")
    context, trained, batch = shorten(byte_base, 64, *turns)
    assert (context, trained) == ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>\n")
    assert batch.counts == {"system messages too long left out": 1}


def test_of_several_exchanges_only_the_long_one_is_shortened(byte_base: Base):
    talk = [("user", "q1"), ("assistant", "a1"), ("user", "x " * 200), ("assistant", "a2"), ("user", "q3")]
    turns = [Turn(*turn) for turn in (*talk, ("assistant", "a3"))]
    batch = encoder(byte_base, 64, all_tokens=False).encode([Conversation(turns)])
    plain = PlainTokenizer(byte_base.path)
    texts = [plain.text.decode(ids, skip_special_tokens=False) for ids, _ in chunks_of(batch)]
    assert [[name for name in ("q1", "a1", "x x", "a2", "q3", "a3") if name in text] for text in texts] == [
        ["q1", "a1"],
        ["x x", "a2"],
        ["q3", "a3"],
    ]
    assert batch.counts == {"conversations cut between turns": 1, "questions cut at their beginning": 1}


def test_an_exchange_whose_question_has_no_room_is_left_out_and_counted(byte_base: Base):
    talk = [Turn("user", "question " * 100), Turn("assistant", "yes " * 100)]
    batch = encoder(byte_base, 16, all_tokens=False).encode([Conversation(talk)])
    assert len(batch.lengths) == 0
    assert batch.counts == {"exchanges too long left out": 1}


def test_tokens_per_han_character_counts_tokens_that_cover_one(byte_base: Base):
    batch = encoder(byte_base, 512).encode([Document("abc 长江 def 江")], measured=1)
    encoding = PlainTokenizer(byte_base.path).text.encode("abc 长江 def 江", add_special_tokens=False)
    covering = sum(any(c in "长江" for c in "abc 长江 def 江"[a:b]) for a, b in encoding.offsets)
    assert (batch.han_tokens, batch.han_characters) == (covering, 3)
