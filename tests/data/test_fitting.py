"""Conversations too long for a sequence, in templates of their own: every part is one that the template writes."""

import random
from collections import Counter

import numpy as np
import pytest

from cqlora.data.encode import EncodeSettings, RecordEncoder
from cqlora.data.records import Conversation, Turn
from cqlora.data.tokenizer import PlainTokenizer
from tests.data.conftest import sample_texts
from tests.data.template_families import source_of, write_family

NAMES = ("qwen3", "llama2", "llama3", "mistral")
ENDS = {"qwen3": "<|im_end|>", "llama2": "</s>", "llama3": "<|eot_id|>", "mistral": "</s>"}


@pytest.fixture(scope="module", params=NAMES)
def family(request, tmp_path_factory):
    name = request.param
    return name, write_family(tmp_path_factory.mktemp("family") / name, name)


def cut(name, base, length, turns, system_prompt="") -> tuple[list[tuple[str, str]], Counter[str], np.ndarray]:
    """(text, what of it is trained) of each part of a conversation, what was counted, and the parts' characters."""
    settings = EncodeSettings(str(base.path), length, False, system_prompt, template=source_of(name))
    settings.wording.settle(Conversation(turns), Counter())
    batch = RecordEncoder(settings).encode([Conversation(turns)])
    ends = np.cumsum(batch.lengths)[:-1]
    tokenizer = PlainTokenizer(base.path).text
    parts = []
    whole = zip(np.split(batch.tokens, ends), np.split(batch.labels, ends), strict=True)
    for ids, labels in whole if len(batch.tokens) else ():
        assert len(ids) <= length and not labels[0]
        decoded = [
            tokenizer.decode(each.tolist(), skip_special_tokens=False) for each in (ids, ids[labels.astype(bool)])
        ]
        parts.append((decoded[0], decoded[1]))
    return parts, batch.counts, batch.characters


@pytest.mark.parametrize("seed", range(3))
def test_a_long_conversation_becomes_conversations_that_each_open_with_the_system_message(family, seed):
    name, base = family
    rng, texts = random.Random(seed), sample_texts()
    turns = [Turn("system", "Answer well.")]
    for number in range(8):
        turns.append(Turn("user", f"Q{number} " + rng.choice(texts)[: rng.randrange(5, 60)].strip()))
        turns.append(Turn("assistant", f"A{number} " + rng.choice(texts)[: rng.randrange(5, 200)].strip()))
    parts, counts, characters = cut(name, base, 450, turns)
    assert len(parts) > 1 and counts == {"conversations cut between turns": 1}
    assert all(text.count("Answer well.") == 1 for text, _ in parts)
    said = [each.strip() for _, trained in parts for each in trained.split(ENDS[name])[:-1]]
    # Qwen writes the last reply of every part after the empty thought, which is trained.
    assert [each.removeprefix("<think>\n\n</think>\n\n") for each in said] == [turn.text for turn in turns[2::2]]
    assert characters.sum() >= sum(len(turn.text) for turn in turns[2::2])
    for text, trained in parts:
        asked = [n for n in range(8) if f"Q{n} " in text]
        assert asked == [n for n in range(8) if f"A{n} " in trained] and asked


def test_a_question_too_long_loses_its_beginning_and_the_reply_stays_whole(family):
    name, base = family
    question = "、".join(f"第{n}个长江问题" for n in range(200)) + "，最后呢？"
    ((text, trained),), counts, _ = cut(
        name, base, 96, [Turn("system", "简短。"), Turn("user", question), Turn("assistant", "很长。")]
    )
    assert counts == {"questions cut at their beginning": 1}
    assert "简短。" in text and "最后呢？" in text and "第0个" not in text
    assert trained.removeprefix("<think>\n\n</think>\n\n").strip().startswith("很长。") and ENDS[name] in trained


def test_a_reply_too_long_ends_early_after_its_question(family):
    name, base = family
    answer = "\n".join(sample_texts()[:20])
    ((text, trained),), counts, characters = cut(name, base, 96, [Turn("user", "长江？"), Turn("assistant", answer)])
    assert counts == {"replies cut at their end": 1} and "长江？" in text
    said = trained.rstrip("\ufffd").strip()
    assert answer.startswith(said.removeprefix("<think>\n\n</think>\n\n")) and ENDS[name] not in trained
    assert len(said) <= characters.sum() <= len(trained) + 1


def test_a_system_message_without_room_is_left_out_and_a_hopeless_exchange_too(family):
    name, base = family
    talk = [Turn("system", ("rules " * 300).strip()), Turn("user", "q"), Turn("assistant", "yes")]
    ((text, _),), counts, _ = cut(name, base, 64, talk)
    assert "rules" not in text and counts == {"system messages too long left out": 1}
    parts, counts, _ = cut(name, base, 8, [Turn(role, "word " * 100 + "end") for role in ("user", "assistant")])
    assert not parts and counts["exchanges too long left out"] == 1


def test_the_stages_system_prompt_comes_first_in_every_template(family):
    name, base = family
    talk = [Turn("user", "q"), Turn("assistant", "a")]
    ((text, _),), _, _ = cut(name, base, 256, talk, "Be brief.")
    ((own, _),), _, _ = cut(name, base, 256, [Turn("system", "Own."), *talk], "Be brief.")
    assert "Be brief." in text and "Be brief." not in own and "Own." in own
