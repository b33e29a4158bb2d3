"""What is measured of replies, and that they are the engine's own."""

from collections import Counter

import pytest

from cqlora.evaluation.generations import generate, language_share, read_prompts, repetition


def test_there_are_twenty_chinese_and_ten_english_prompts_in_both_forms():
    prompts = read_prompts()
    assert Counter(prompt.language for prompt in prompts) == {"zh": 20, "en": 10}
    for prompt in prompts:
        assert language_share(prompt.question, prompt.language) == language_share(prompt.opening, prompt.language) == 1
    assert len({prompt.question for prompt in prompts} | {prompt.opening for prompt in prompts}) == 60


@pytest.mark.parametrize(
    ("reply", "language", "share"),
    [("长江很长", "zh", 1.0), ("long 长", "zh", 0.2), ("长 long", "en", 0.8), ("123 …", "zh", 0.0), ("", "en", 0.0)],
)
def test_a_share_counts_letters_of_the_languages_script(reply, language, share):
    assert language_share(reply, language) == pytest.approx(share)


@pytest.mark.parametrize(
    ("reply", "language", "repeated"),
    [
        ("甲乙丙丁戊", "zh", 0.0),
        ("甲甲甲甲甲甲", "zh", 2 / 3),
        ("甲乙丙", "zh", 0.0),
        ("a b c d a b c d", "en", 1 / 5),
        ("A b c d. a B c d.", "en", 1 / 5),
    ],
)
def test_repetition_is_the_share_of_4_grams_seen_before(reply, language, repeated):
    assert repetition(reply, language) == pytest.approx(repeated)


@pytest.mark.parametrize("as_chat", [True, False], ids=["chat", "text"])
def test_replies_are_the_engines_own_greedy_ones(as_chat, engine):
    found = list(generate(engine, as_chat, max_new_tokens=6))
    assert len(found) == 30
    assert all(1 <= row["tokens"] <= 6 and (row["ended"] or row["tokens"] == 6) for row in found)
    prompts = read_prompts()
    for row, prompt in list(zip(found, prompts, strict=True))[:2]:
        ids = (
            engine.encode_messages([{"role": "user", "text": prompt.question}])
            if as_chat
            else engine.encode_text(prompt.opening)
        )
        assert row["prompt"] == (prompt.question if as_chat else prompt.opening)
        assert row["reply"].replace("\ufffd", "") == greedy(engine, ids, 6)


def greedy(engine, ids: list[int], most: int) -> str:
    """The likeliest token each time, from whole passes; bytes that are no character are left out."""
    reply = []
    while len(reply) < most:
        token = int(engine._decoder.all_logits(ids + reply)[-1].argmax())
        if token in engine._end_ids:
            break
        reply.append(token)
    return b"".join(map(engine._token_bytes, reply)).decode(errors="ignore")
