"""Bodies that are made to cost: what is refused before it is parsed, and where the rest is parsed."""

import json
import threading

import httpx
import pytest

from cqlora.serve import body as body_module
from cqlora.serve.body import DEEPEST, MOST_BYTES, MOST_VALUES, body_limit, parse
from cqlora.serve.failure import Failure
from cqlora.serve.requests import MOST_MESSAGES, ChatRequest, CompletionRequest
from tests.serve.fake import FakeEngine, fake_config, running

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def dump(**fields: object) -> bytes:
    return json.dumps(CHAT | fields).encode()


def refusal(body: bytes, kind=ChatRequest) -> Failure:
    with pytest.raises(Failure) as refused:
        parse(body, kind)
    assert refused.value.status_code == 400 and len(refused.value.detail) < 300
    return refused.value


COSTLY = {
    "two million list items": b'{"messages": [' + b"1," * 1_999_990 + b"1]}",
    "a million lists": b'{"messages": [' + b"[]," * 1_300_000 + b"[]]}",
    "a million empty names": b"{" + b'"":1,' * 800_000 + b'"":1}',
    "a million strings": b'{"stop": [' + b'"",' * 1_300_000 + b'""]}',
    "metadata": b'{"metadata": [' + b"{}," * 1_300_000 + b"{}]}",
}


@pytest.mark.parametrize("body", COSTLY.values(), ids=COSTLY.keys())
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(body, monkeypatch):
    monkeypatch.setattr(body_module.json, "loads", lambda text: pytest.fail("it was parsed"))
    assert len(body) <= MOST_BYTES
    assert refusal(body).code == "too_many_values"


def test_as_many_values_as_are_allowed_are_parsed():
    metadata = dict.fromkeys(map(str, range(MOST_VALUES // 2)), 1)
    assert parse(dump(metadata=metadata), ChatRequest).messages[0].content == "hi"


@pytest.mark.parametrize("text", [",[{" * 200_000, '"' * 200_000, "\\" * 200_001, '\\"[' * 200_000, "\\\\" * 9 + ",]"])
def test_what_stands_in_a_text_is_not_counted(text):
    assert parse(json.dumps({"prompt": text}).encode(), CompletionRequest).text() == text


def test_brackets_in_brackets_are_counted_and_do_not_reach_the_parser(monkeypatch):
    nested = b'{"metadata": ' + b"[" * (DEEPEST - 1) + b"]" * (DEEPEST - 1) + b', "prompt": "a"}'
    assert parse(nested, CompletionRequest).text() == "a"
    monkeypatch.setattr(body_module.json, "loads", lambda text: pytest.fail("it was parsed"))
    assert "nested deeper" in refusal(b"[" * 20_000).detail
    assert "nested deeper" in refusal(b'{"a":' * 20_000).detail


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "gb18030"])
def test_a_body_in_another_encoding_is_reported(encoding):
    text = json.dumps({"prompt": "你好"}, ensure_ascii=False)
    assert "UTF-8" in refusal(text.encode(encoding), CompletionRequest).detail or encoding == "utf-16"
    assert parse(text.encode("utf-8-sig"), CompletionRequest).text() == "你好"


@pytest.mark.parametrize(
    "body",
    [dump() + b"x", b"", b"[]", b'"a"', b"null", b"1" * 100_000, dump()[:-1] + b', "seed": ' + b"9" * 100_000 + b"}",
     dump(seed=1.5), dump(**{"x" * 100_000: 1}), dump(model=["x" * 100_000]), dump(stop=["a" * 100_000]),
     dump(stop=["a"] * 17), dump(temperature=float("nan")), dump(messages=[]), dump(messages={}),
     dump(messages=[{"role": "user", "content": [{"type": "text", "text": 1}] * 1024}]),
     dump(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 1025}]),
     dump(messages=[{"role": "user", "content": "a"}] * (MOST_MESSAGES + 1))],
)  # fmt: skip
def test_whatever_is_sent_is_described_in_one_short_sentence(body):
    with pytest.raises(Failure) as refused:
        parse(body, ChatRequest).sampling(100)
    assert refused.value.status_code == 400
    assert len(refused.value.detail) < 300 and "\n" not in refused.value.detail


def test_checking_ends_at_the_first_item_that_is_wrong(monkeypatch):
    counts = []
    explain = body_module.explain
    monkeypatch.setattr(body_module, "explain", lambda errors: counts.append(len(errors)) or explain(errors))
    for wrong in (
        {"messages": [1] * 4000},
        {"stop": [1] * 40_000},
        {"messages": [{"role": "user", "content": [1] * 1000}] * 40},
    ):
        refusal(dump(**wrong))
    assert max(counts) < 10


def test_bodies_are_parsed_and_encoded_beside_the_event_loop(monkeypatch):
    threads = []
    monkeypatch.setattr(
        "cqlora.serve.service.parse", lambda *given: threads.append(threading.current_thread()) or parse(*given)
    )
    engine = FakeEngine()
    encode = engine.encode_text
    engine.encode_text = lambda text: threads.append(threading.current_thread()) or encode(text)
    with running(engine, fake_config()) as run:
        assert httpx.post(run.url + "/v1/chat/completions", json=CHAT).status_code == 200
        assert len(threads) == 2 and run.thread not in threads


def test_messages_that_cannot_fit_are_not_encoded():
    engine = FakeEngine(max_length=4096)
    engine.encode_messages = lambda messages: pytest.fail("they were encoded")
    with running(engine, fake_config()) as run:
        response = httpx.post(run.url + "/v1/chat/completions", json={"messages": CHAT["messages"] * 2000})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "at least 8000 tokens" in response.json()["error"]["message"]


def test_a_body_has_room_for_what_the_model_holds_and_little_more():
    assert body_limit(8192) == (64 << 10) + 64 * 8192 and body_limit(1 << 20) == MOST_BYTES
    longest = json.dumps("中" * 8192)  # six bytes a character
    assert len(longest) < body_limit(8192)
    with running(FakeEngine(max_length=100), fake_config()) as run:
        for content in ("x" * 72_000, "x" * 60_000):
            asked = {"messages": [{"role": "user", "content": content}]}
            response = httpx.post(run.url + "/v1/chat/completions", json=asked)
            assert response.status_code == (413 if len(content) > 70_000 else 400)
        assert "larger than 70 KiB" in httpx.post(run.url + "/v1/completions", content=b" " * 100_000).text
