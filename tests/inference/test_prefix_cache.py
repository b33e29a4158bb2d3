"""What ended replies leave is used where tokens are the same, changes no reply, and takes no more than its limit."""

import threading

import pytest
import torch

from cqlora.engine import LlamaEngine
from cqlora.inference.decoder import Segment
from cqlora.inference.prefix_cache import LEAST_TOKENS, PrefixCache
from cqlora.inference.requests import Sampling

GIB = 2**30
CHAT = [("user", "长江是亚洲最长的河流。The longest river?"), ("user", "in Asia"), ("user", "你好，河流")]


@pytest.fixture(scope="module")
def plain(base, adapter):
    return LlamaEngine(adapter, base, dtype="float32")


@pytest.fixture
def engine(base, adapter):
    return LlamaEngine(adapter, base, dtype="float32", prefix_cache_gib=0.1)


@pytest.fixture
def prefixes(plain):
    return PrefixCache(plain._decoder, GIB)


def read(engine, ids):
    """A cache after these tokens."""
    cache = engine._decoder.new_cache()
    engine._decoder.next_logits([Segment(cache, ids)])
    return cache


def converse(engine, **sampling) -> list[tuple[str, int]]:
    """Each turn's reply, and the tokens of its prompt that were not read again."""
    messages, said = [], []
    for role, text in CHAT:
        messages.append({"role": role, "text": text})
        batch = engine.open_batch(1)
        reply = batch.admit(engine.encode_messages(messages), Sampling(**sampling))
        words = ""
        while reply.finish_reason is None:
            words += "".join(text for _, text in batch.step())
        messages.append({"role": "assistant", "text": words})
        said.append((words, reply.reused_tokens))
    return said


def test_a_conversation_is_the_same_with_and_without_and_later_turns_read_only_what_is_new(engine, plain):
    asked = {"temperature": 0, "max_new_tokens": 12}
    found, expected = converse(engine, **asked), converse(plain, **asked)
    assert [words for words, _ in found] == [words for words, _ in expected]
    assert [reused for _, reused in expected] == [0, 0, 0]
    first_prompt = len(plain.encode_messages([{"role": "user", "text": CHAT[0][1]}]))
    assert found[0][1] == 0 and first_prompt <= found[1][1] < found[2][1]


def test_logits_after_a_reused_beginning_are_those_of_the_whole_prompt(plain, prefixes):
    ids = list(range(20, 80))
    prefixes.keep(ids, read(plain, ids))
    for going_on in ([*ids, 7, 8, 9], ids[:50] + list(range(100, 130)), ids, ids[:40]):
        cache = prefixes.open(going_on)
        assert cache.length >= min(len(going_on) - 1, 50)
        logits = plain._decoder.next_logits([Segment(cache, going_on[cache.length :])])
        expected = plain._decoder.next_logits([Segment(plain._decoder.new_cache(), going_on)])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        prefixes.keep(going_on, cache)


def test_a_seeded_reply_has_the_same_bits_whatever_was_said_before(base, nf4_adapter):
    asked = Sampling(temperature=1.2, seed=5, max_new_tokens=20, ignore_end=True)
    engine = LlamaEngine(nf4_adapter, base, prefix_cache_gib=0.1)
    ids = engine.encode_messages([{"role": "user", "text": CHAT[0][1]}])
    logits = []
    for _ in range(2):
        batch = engine.open_batch(1)
        reply = batch.admit(ids, asked)
        reply.chooser.choose = lambda row, choose=reply.chooser.choose: logits.append(row) or choose(row)
        while reply.finish_reason is None:
            batch.step()
        assert reply.reused_tokens == 0 and engine._prefixes.nbytes > 0
    assert all(torch.equal(one, other) for one, other in zip(logits[:20], logits[20:], strict=True))


def test_only_the_tokens_that_two_conversations_share_are_shared(plain, prefixes):
    system, mine, yours = [5] * 20, list(range(20, 60)), list(range(30, 70))
    prefixes.keep(system + mine, read(plain, system + mine))
    assert prefixes.open([6, *system, *mine]).length == 0
    assert prefixes.open(mine).length == 0
    copied = prefixes.open(system + yours)
    assert copied.length == len(system)
    copied.store.zero_()
    again = prefixes.open(system + mine + [9])
    assert again.length == len(system + mine)
    assert torch.equal(again.store[:, :, :, : again.length], (expected := read(plain, system + mine)).store[
        :, :, :, : expected.length])  # fmt: skip


def test_what_is_handed_over_is_not_handed_over_twice(plain, prefixes):
    ids = list(range(20, 60))
    prefixes.keep(ids, read(plain, ids))
    assert prefixes.open([*ids, 1]).length == len(ids)
    assert prefixes.open([*ids, 1]).length == 0 and prefixes.nbytes == 0


def test_short_beginnings_are_neither_kept_nor_used(plain, prefixes):
    short = list(range(20, 20 + LEAST_TOKENS - 1))
    prefixes.keep(short, read(plain, short))
    assert prefixes.nbytes == 0
    prefixes.keep(short + [1] * 30, read(plain, short + [1] * 30))
    assert prefixes.open(short + [2] * 30).length == 0


def test_of_two_sequences_one_of_which_begins_the_other_the_longer_is_kept(plain, prefixes):
    ids = list(range(20, 90))
    for kept in (ids[:40], ids, ids[:60]):
        prefixes.keep(kept, read(plain, kept))
    assert prefixes.nbytes == read(plain, ids).store.nbytes
    assert prefixes.open([*ids, 1]).length == len(ids)


def test_memory_stays_within_the_limit_and_the_longest_unused_goes_first(plain):
    size = read(plain, [20] * 40).store.nbytes
    prefixes = PrefixCache(plain._decoder, 3 * size)
    for first in range(30, 34):
        prefixes.keep([first] * 40, read(plain, [first] * 40))
        assert prefixes.nbytes <= 3 * size
        if first == 32:
            prefixes.keep([30] * 40 + [1], prefixes.open([30] * 40 + [1]))
    held = [first for first in range(30, 34) if prefixes.open([first] * 41).length]
    assert held == [30, 32, 33]


def test_a_sequence_above_the_limit_is_kept_as_far_as_it_fits(plain):
    ids = list(range(20, 220))
    cache = read(plain, ids)
    limit = 100 * cache.bytes_per_token
    prefixes = PrefixCache(plain._decoder, limit)
    prefixes.keep(ids, cache)
    assert 0 < prefixes.nbytes <= limit and cache.store.untyped_storage().nbytes() == 0
    assert prefixes.open(ids).length == 100


def test_without_a_limit_nothing_is_kept(plain):
    prefixes = PrefixCache(plain._decoder, 0)
    prefixes.keep([20] * 40, read(plain, [20] * 40))
    assert prefixes.nbytes == 0 and prefixes.open([20] * 41).length == 0


def test_memory_is_flat_over_many_conversations(base, adapter):
    engine = LlamaEngine(adapter, base, dtype="float32", prefix_cache_gib=4 * 2**20 / GIB)
    for number in range(40):
        engine.generate([{"role": "user", "text": f"{number} 长江 " * 8}], temperature=0, max_new_tokens=2)
        assert engine._prefixes.nbytes <= 4 * 2**20
    assert engine._prefixes.nbytes > 2 * 2**20


def test_replies_that_end_one_after_the_other_in_a_batch_each_leave_their_own(engine):
    batch = engine.open_batch(4)
    prompts = [engine.encode_messages([{"role": "user", "text": f"{number} {CHAT[0][1]}"}]) for number in range(4)]
    lengths = (4, 9, 2, 6)
    replies = [
        batch.admit(prompt, Sampling(temperature=0, max_new_tokens=length, ignore_end=True))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    while batch.free_slots < 4:
        batch.step()
    for reply in replies:
        kept, expected = engine._prefixes.open(reply.ids), read(engine, reply.ids[:-1])
        assert kept.length == expected.length
        own = (cache.store[:, :, :, : cache.length] for cache in (kept, expected))
        torch.testing.assert_close(*own, atol=1e-4, rtol=1e-4)


def test_a_reply_that_is_left_half_way_leaves_its_prompt(engine):
    message = [{"role": "user", "text": CHAT[0][1]}]
    stream = engine.stream(message, temperature=0, ignore_end=True)
    next(stream)
    stream.close()
    reply = engine.open_batch(1).admit(engine.encode_messages(message), Sampling())
    assert reply.reused_tokens == reply.prompt_tokens - 1


def test_threads_that_share_an_engine_each_get_the_reply_they_would_get_alone(engine, plain):
    chats = [[{"role": "user", "text": f"{CHAT[0][1]} {number}"}] for number in range(4)] * 2
    asked = {"temperature": 0, "max_new_tokens": 6}
    found = {}

    def ask(number: int) -> None:
        found[number] = engine.generate(chats[number], **asked)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(chats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(chats))] == [plain.generate(chat, **asked) for chat in chats]
