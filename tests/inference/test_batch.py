"""Replies share a batch and nothing else: each comes as if it were alone, and leaves when it is done."""

import pytest
import torch

from cqlora.engine import LlamaEngine
from cqlora.errors import DataError
from cqlora.inference.requests import Sampling


@pytest.fixture(scope="module", params=["float32", "auto"])
def engine(request, base, nf4_adapter):
    return LlamaEngine(nf4_adapter, base, dtype=request.param)


def prompt(engine, text: str) -> list[int]:
    return engine.encode_messages([{"role": "user", "text": text}])


def finish(batch, reply) -> str:
    text = ""
    while reply.finish_reason is None:
        text += "".join(piece for other, piece in batch.step() if other is reply)
    return text


def test_a_seeded_reply_is_the_same_whatever_else_is_in_the_batch(engine):
    asked = Sampling(temperature=1.2, top_p=0.95, seed=11, max_new_tokens=30, ignore_end=True)
    alone = engine.open_batch(1)
    expected = finish(alone, alone.admit(prompt(engine, "长江"), asked))
    batch = engine.open_batch(6)
    others = [Sampling(temperature=1.0, max_new_tokens=n, ignore_end=True) for n in (5, 12, 40)]
    batch.admit(prompt(engine, "one"), others[0])
    batch.step()
    reply = batch.admit(prompt(engine, "长江"), asked)
    batch.admit(prompt(engine, "a longer one than the others are"), others[1])
    batch.admit(prompt(engine, "last"), others[2])
    assert finish(batch, reply) == expected


def test_replies_of_a_batch_are_those_of_the_conversations_alone(engine):
    chats = [[{"role": "user", "text": text}] for text in ("长江", "Asia", "the longest river")]
    together = engine.generate_batch(chats, temperature=0, max_new_tokens=12)
    if engine.form.startswith("matrices in float32"):
        assert together == [engine.generate(chat, temperature=0, max_new_tokens=12) for chat in chats]
    assert len(together) == 3


def test_slots_are_counted_and_a_reply_that_ends_frees_its_own(engine):
    batch = engine.open_batch(2)
    short = batch.admit(prompt(engine, "a"), Sampling(max_new_tokens=1))
    long = batch.admit(prompt(engine, "b"), Sampling(max_new_tokens=3, ignore_end=True))
    assert batch.free_slots == 0
    with pytest.raises(RuntimeError):
        batch.admit(prompt(engine, "c"), Sampling())
    assert {reply for reply, _ in batch.step()} == {short, long}
    assert short.completion_tokens == 1 and batch.free_slots == 1
    assert [reply for reply, _ in batch.step()] == [long]
    batch.step()
    assert (long.finish_reason, long.completion_tokens, batch.free_slots) == ("length", 3, 2)
    assert long.prompt_tokens == len(prompt(engine, "b")) and batch.step() == []


def test_a_released_reply_frees_its_slot_and_its_memory_at_once(engine):
    batch = engine.open_batch(1)
    reply = batch.admit(prompt(engine, "a"), Sampling(ignore_end=True))
    batch.step()
    assert reply.cache.store.numel() > 0
    batch.release(reply)
    batch.release(reply)
    assert batch.free_slots == 1 and batch.step() == [] and reply.cache.store.untyped_storage().nbytes() == 0


def test_a_reply_ends_where_the_positions_end_and_a_longer_prompt_is_refused(engine):
    batch = engine.open_batch(1)
    longest = engine.max_length
    reply = batch.admit([20] * (longest - 3), Sampling(max_new_tokens=100, ignore_end=True))
    finish(batch, reply)
    assert (reply.finish_reason, reply.completion_tokens) == ("length", 3)
    with pytest.raises(DataError, match=f"{longest} tokens and the model holds {longest}"):
        batch.admit([20] * longest, Sampling())
    with pytest.raises(DataError, match="empty"):
        batch.admit([], Sampling())


def test_end_tokens_and_stop_strings_end_a_reply_with_stop(engine, monkeypatch):
    end = next(iter(engine._end_ids))
    script = iter([20, end])
    monkeypatch.setattr("cqlora.inference.choice.TokenChooser.choose", lambda self, logits: next(script))
    batch = engine.open_batch(1)
    reply = batch.admit([20], Sampling())
    batch.step()
    batch.step()
    assert (reply.finish_reason, reply.completion_tokens, batch.free_slots) == ("stop", 2, 1)
    script = iter(engine._tokenizer.text.encode("ab STOP cd").ids)
    reply = batch.admit([20], Sampling(stop=("STOP",)))
    assert finish(batch, reply) == "ab " and reply.finish_reason == "stop"


def test_memory_of_keys_is_what_the_replies_need(engine):
    batch = engine.open_batch(1)
    reply = batch.admit([20] * 10, Sampling(ignore_end=True))
    batch.step()
    shape = engine._decoder.architecture
    per_position = shape.layers * 2 * shape.key_value_heads * shape.head_dim * torch.float32.itemsize
    assert reply.cache.store.nbytes <= 256 * per_position


def start_three(engine):
    """A batch of three greedy replies, one step on; the second is the one to break."""
    batch = engine.open_batch(4)
    asked = Sampling(temperature=0, max_new_tokens=6, ignore_end=True)
    replies = [batch.admit(prompt(engine, text), asked) for text in ("长江", "Asia", "river")]
    batch.step()
    return batch, replies


@pytest.mark.parametrize("where", ["choose", "add"], ids=["the choice of its token", "its text"])
def test_an_error_in_one_reply_ends_that_reply_alone(engine, monkeypatch, caplog, where):
    batch, (first, broken, last) = start_three(engine)
    planted = ValueError("planted")

    def fail(*_):
        raise planted

    monkeypatch.setattr(broken.chooser if where == "choose" else broken.text, where, fail)
    with caplog.at_level("ERROR"):
        produced = {id(reply): text for reply, text in batch.step()}
    assert broken.failure is planted and broken.finish_reason is None and produced[id(broken)] == ""
    assert "1 of 3 replies end by an error" in caplog.text and "planted" in caplog.text
    assert batch.free_slots == 2 and broken.cache.store.numel() == 0
    finish(batch, first), finish(batch, last)
    assert [len(reply.ids) - reply.prompt_tokens for reply in (first, last)] == [6, 6]
    alone = engine.open_batch(1)
    again = alone.admit(prompt(engine, "river"), Sampling(temperature=0, max_new_tokens=6, ignore_end=True))
    finish(alone, again)
    if engine.form.startswith("matrices in float32"):
        assert again.ids == last.ids


def test_an_error_in_a_prompt_ends_that_reply_alone(engine, monkeypatch):
    batch, others = start_three(engine)
    broken = batch.admit(prompt(engine, "a new one"), Sampling())
    read = batch._decoder.next_logits

    def fail(segments, *args, **options):
        if any(segment.cache is broken.cache for segment in segments):
            raise RuntimeError("planted")
        return read(segments, *args, **options)

    monkeypatch.setattr(batch._decoder, "next_logits", fail)
    batch.step()
    assert isinstance(broken.failure, RuntimeError) and batch.free_slots == 1
    assert [(reply.failure, reply.completion_tokens) for reply in others] == [(None, 2)] * 3


def test_an_error_in_a_whole_step_ends_its_replies_and_the_next_are_as_ever(engine, monkeypatch):
    asked = Sampling(temperature=0, max_new_tokens=5, ignore_end=True)
    alone = engine.open_batch(1)
    expected = finish(alone, alone.admit(prompt(engine, "长江"), asked))
    batch, replies = start_three(engine)
    with monkeypatch.context() as broken:
        broken.setattr(batch._decoder, "_feed_forward", lambda *_: 1 / 0)
        batch.step()
    assert all(isinstance(reply.failure, ZeroDivisionError) for reply in replies)
    assert batch.free_slots == 4 and batch.step() == []
    assert finish(batch, batch.admit(prompt(engine, "长江"), asked)) == expected


def test_the_engines_own_calls_raise_what_ended_a_reply(engine, monkeypatch):
    monkeypatch.setattr("cqlora.inference.choice.TokenChooser.choose", lambda self, logits: 1 / 0)
    for call in (engine.generate, lambda chat: engine.generate_batch([chat])):
        with pytest.raises(ZeroDivisionError):
            call([{"role": "user", "text": "a"}])


@pytest.mark.parametrize("token", [448, 10**9, -1])
def test_an_id_that_is_no_row_is_refused_and_harms_nobody(engine, token):
    batch, replies = start_three(engine)
    with pytest.raises(DataError, match=f"token id {token}; give ids from 0 to 447"):
        batch.admit([20, token], Sampling())
    batch.step()
    assert all(reply.failure is None for reply in replies)
