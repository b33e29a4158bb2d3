"""The API over real connections: what is answered, what is refused and how, and what a client that goes leaves."""

import json
import socket
import threading

import httpx
import pytest

from cqlora.serve.scheduler import MOST_FAILED_STEPS
from tests.conftest import HANG_SECONDS
from tests.serve.fake import FakeEngine, fake_config, running

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def served():
    """A server that answers at once."""
    with running(FakeEngine(max_length=200), fake_config(max_tokens=50, slots=4, queue=8)) as run:
        yield run


def post(run, body, path="/v1/chat/completions", **options):
    return httpx.post(run.url + path, json=body, timeout=HANG_SECONDS, **options)


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def test_a_chat_is_answered_in_openais_shape(served):
    body = post(served, CHAT | {"model": "fake"}).json()
    assert body["object"] == "chat.completion" and body["model"] == "fake"
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "w0 w1 w2 w3 w4 " and choice["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


def test_a_stream_says_the_same_and_ends_with_done(served):
    asked = CHAT | {"stream": True, "max_tokens": 3, "stream_options": {"include_usage": True}}
    response = post(served, asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response)
    chunks = [json.loads(chunk) for chunk in chunks]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "w0 w1 w2 "
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert json.loads(usage)["usage"]["completion_tokens"] == 3 and json.loads(usage)["choices"] == []
    assert done == "[DONE]"


def test_a_stream_that_was_not_asked_for_usage_tells_none(served):
    *chunks, done = events(post(served, CHAT | {"stream": True}))
    assert not any("usage" in json.loads(chunk) for chunk in chunks) and done == "[DONE]"


@pytest.mark.parametrize("prompt", ["hi", ["hi"]])
def test_a_text_is_completed(served, prompt):
    body = post(served, {"prompt": prompt, "max_tokens": 2}, "/v1/completions").json()
    assert body["object"] == "text_completion"
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("w0 w1 ", "length")
    assert body["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        ({}, 400, "missing_parameter", "`messages` is missing"),
        ([1], 400, "invalid_json", "no JSON object"),
        ({"messages": []}, 400, "invalid_value", "`messages` is []"),
        (CHAT | {"temprature": 1}, 400, "unknown_parameter", "did you mean `temperature`?"),
        (CHAT | {"temperature": 3}, 400, "invalid_value", "`temperature` is 3"),
        (CHAT | {"temperature": "1"}, 400, "invalid_value", "`temperature` is '1'"),
        (CHAT | {"top_p": 0}, 400, "invalid_value", "`top_p` is 0"),
        (CHAT | {"max_tokens": 51}, 400, "invalid_value", "more than this server's 50"),
        (CHAT | {"max_completion_tokens": 51}, 400, "invalid_value", "more than this server's 50"),
        (CHAT | {"max_tokens": True}, 400, "invalid_value", "`max_tokens` is True"),
        (CHAT | {"n": 2}, 400, "unsupported_parameter", "`n` is not supported"),
        (CHAT | {"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "`tools` is not supported"),
        (CHAT | {"logprobs": True}, 400, "unsupported_parameter", "`logprobs` is not supported"),
        (CHAT | {"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "`response_format`"),
        (CHAT | {"presence_penalty": 0.5}, 400, "unsupported_parameter", "use repetition_penalty"),
        (CHAT | {"stop": ""}, 400, "invalid_value", "`stop`"),
        (CHAT | {"stop": ["a"] * 17}, 400, "invalid_value", "`stop`"),
        (CHAT | {"model": "gpt-4"}, 404, "model_not_found", "ask for 'fake'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_value", "`messages.0.role` is 'tool'"),
        ({"messages": [{"role": "user"}]}, 400, "invalid_value", "no `content`"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "invalid_value",
            "`messages.0.content.0.type` is 'image_url'",
        ),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "context_length_exceeded", "305 tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_sentence(served, body, status, code, words):
    response = post(served, body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert words in error["message"] and error["message"].count("\n") == 0
    assert error["type"] == "invalid_request_error"


def test_several_prompts_in_one_request_are_refused(served):
    assert post(served, {"prompt": ["a", "b"]}, "/v1/completions").json()["error"]["code"] == "unsupported_parameter"


def test_fields_that_ask_for_nothing_are_taken(served):
    neutral = {"n": 1, "tools": [], "logprobs": None, "presence_penalty": 0, "user": "me", "metadata": {"a": "b"}}
    assert post(served, CHAT | neutral | {"response_format": {"type": "text"}}).status_code == 200


def test_parts_of_text_and_the_developers_role_reach_the_model(served):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    assert post(served, {"messages": messages}).status_code == 200
    assert served.server.service.engine.admitted[-1] == "system:be brief|user:ab"


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{nonsense", {"content-type": "application/json"}, 400),
        (json.dumps(CHAT).encode(), {"content-type": "text/plain"}, 400),
        (b"x" * (5 << 20), {"content-type": "application/json"}, 413),
        ((b"x" * (1 << 20) for _ in range(5)), {"content-type": "application/json"}, 413),
    ],
    ids=["broken", "as a form of another site would send it", "declared too large", "too large without saying so"],
)
def test_bodies_that_are_not_json_or_too_large_are_refused(served, content, headers, status):
    response = httpx.post(served.url + "/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status and response.json()["error"]["message"]


def test_a_body_that_is_not_utf_8_is_reported(served):
    body = '{"messages": [{"role": "user", "content": "你好"}]}'.encode("gb18030")
    response = httpx.post(
        served.url + "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_json")
    assert error["message"] == "the body cannot be read; send JSON in UTF-8."


@pytest.mark.parametrize(
    "body",
    [b'{"messages": [{"role": "\\ud83d", "content": "a"}]}', b'{"\\ud83d": 1}',
     b'{"model": "\\ud83d", "messages": [{"role": "user", "content": "a"}]}',
     b'{"messages": [{"role": "user", "content": "a"}], "stop": "\\ud83d"}'],
    ids=["role", "field", "model", "stop"],
)  # fmt: skip
def test_half_a_surrogate_pair_breaks_nothing(served, body):
    response = httpx.post(
        served.url + "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code < 500, response.text


def test_other_paths_and_methods_are_refused_in_openais_shape_too(served):
    assert httpx.get(served.url + "/v1/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(served.url + "/v1/completions").json()["error"]["code"] == "method_not_allowed"


def test_the_model_is_listed(served):
    (model,) = httpx.get(served.url + "/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"], model["max_tokens"]) == ("fake", 200, 50)
    assert httpx.get(served.url + "/v1/models/fake").json() == model
    assert httpx.get(served.url + "/v1/models/other").status_code == 404


def read_metric(run, name: str) -> float:
    lines = httpx.get(run.url + "/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).split()[-1])


def test_the_metrics_count_requests_and_tokens():
    with running(FakeEngine(), fake_config()) as run:
        post(run, CHAT)
        post(run, CHAT | {"n": 2})
        assert read_metric(run, 'cqlora_requests_total{path="/v1/chat/completions",status="200"}') == 1
        assert read_metric(run, 'cqlora_requests_total{path="/v1/chat/completions",status="400"}') == 1
        assert read_metric(run, "cqlora_prompt_tokens_total") == 7
        assert read_metric(run, "cqlora_completion_tokens_total") == 5
        assert read_metric(run, "cqlora_first_token_seconds_count") == 1
        assert read_metric(run, "cqlora_slots") == 2
        assert read_metric(run, "cqlora_slots_active") == read_metric(run, "cqlora_queue_waiting") == 0


def test_a_full_queue_is_answered_429_and_who_waits_is_served_later():
    engine = FakeEngine()
    with running(engine, fake_config(slots=1, queue=1)) as run:
        engine.open.clear()
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(post(run, CHAT))) for _ in range(2)]
        for thread in threads:
            thread.start()
        run.wait_until(lambda: len(run.scheduler._jobs) == 2)
        refused = post(run, CHAT)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) > 0
        engine.open.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("stage", ["active", "waiting"])
def test_a_client_that_goes_away_frees_its_place(stream, stage):
    engine = FakeEngine(words=10**9, seconds_per_step=0.001)
    with running(engine, fake_config(slots=1, queue=1, max_tokens=10**9)) as run:
        goes = [httpx.Client(timeout=HANG_SECONDS) for _ in range(2)]

        def ask(client):
            try:
                with client.stream("POST", run.url + "/v1/chat/completions", json=CHAT | {"stream": stream}) as reply:
                    for _ in reply.iter_bytes():
                        pass
            except httpx.HTTPError:
                pass

        threads = []
        for count, client in enumerate(goes, start=1):
            threads.append(threading.Thread(target=ask, args=(client,)))
            threads[-1].start()
            run.wait_until(lambda count=count: len(run.scheduler._jobs) == count)
        hang_up(goes[0 if stage == "active" else 1])
        run.wait_until(lambda: len(run.scheduler._jobs) == 1, "the place is still taken")
        hang_up(goes[1 if stage == "active" else 0])
        run.wait_until_idle()
        assert run.scheduler.waiting == 0
        run.wait_until(lambda: read_metric(run, "cqlora_abandoned_total") == 2)
        for thread in threads:
            thread.join(timeout=HANG_SECONDS)


def hang_up(client: httpx.Client) -> None:
    """Close the socket under a request that another thread waits on."""
    for connection in client._transport._pool.connections:
        connection._connection._network_stream._sock.shutdown(socket.SHUT_RDWR)


def test_the_time_limit_ends_a_reply_and_frees_its_place():
    engine = FakeEngine(words=10**9, seconds_per_step=0.001)
    with running(engine, fake_config(timeout=0.3, max_tokens=10**9)) as run:
        whole = post(run, CHAT)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "timeout"
        run.wait_until_idle()


def test_a_time_limit_within_a_stream_ends_it_with_an_error_and_frees_its_place():
    engine = FakeEngine(words=10**9, seconds_per_step=0.001)
    with running(engine, fake_config(timeout=HANG_SECONDS, max_tokens=10**9)) as run:
        said = []
        address, body = run.url + "/v1/chat/completions", CHAT | {"stream": True}
        with httpx.stream("POST", address, json=body, timeout=HANG_SECONDS) as reply:
            for line in reply.iter_lines():
                said += [line.removeprefix("data: ")] if line.startswith("data: ") else []
                if len(said) == 3:
                    for job in list(run.scheduler._jobs):
                        job.deadline = 0
        assert len(said) > 3 and json.loads(said[-1])["error"]["code"] == "timeout"
        run.wait_until_idle()


def test_a_client_that_stops_reading_is_cut_off_and_holds_no_place(monkeypatch):
    monkeypatch.setattr("cqlora.serve.service.SECONDS_TO_READ_THE_END", 0.1)
    engine = FakeEngine(words=40, word="x" * 1_000_000)
    body = json.dumps(CHAT | {"stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with running(engine, fake_config(timeout=0.5)) as run:
        with socket.create_connection(("127.0.0.1", int(run.url.rsplit(":", 1)[1]))) as silent:
            silent.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            run.wait_until(lambda: engine.admitted)
            run.wait_until_idle()
            run.wait_until(lambda: not run.server.server_state.tasks, "the stalled connection is kept")
        run.scheduler._timeout = HANG_SECONDS
        assert post(run, CHAT | {"max_tokens": 1}).status_code == 200


def test_an_error_in_one_reply_is_reported_to_its_client_alone():
    engine = FakeEngine(words=20)
    with running(engine, fake_config()) as run:
        step = run.scheduler._batch.step

        def broken():
            produced = step()
            for reply, _ in produced:
                if reply.completion_tokens == 3 and "bad" in "".join(map(chr, reply.prompt_ids)):
                    reply.failure = ValueError("secret path")
                    run.scheduler._batch.release(reply)
            return produced

        run.scheduler._batch.step = broken
        engine.open.clear()
        answers = {}
        bodies = {word: {"messages": [{"role": "user", "content": word}]} for word in ("good", "bad")}
        threads = [
            threading.Thread(target=lambda word=word: answers.update({word: post(run, bodies[word])}))
            for word in bodies
        ]
        for thread in threads:
            thread.start()
        run.wait_until(lambda: len(run.scheduler._jobs) == 2)
        engine.open.set()
        for thread in threads:
            thread.join()
        assert answers["good"].json()["usage"]["completion_tokens"] == 20
        error = answers["bad"].json()["error"]
        assert (answers["bad"].status_code, error["code"], error["type"]) == (500, "engine_failed", "server_error")
        assert "secret" not in error["message"]
        *_, last = events(post(run, bodies["bad"] | {"stream": True}))
        assert json.loads(last)["error"]["code"] == "engine_failed"
        run.wait_until_idle()


def test_a_step_that_fails_ends_its_replies_and_the_engine_serves_the_next():
    engine = FakeEngine()
    with running(engine, fake_config()) as run:
        engine.breaks = True
        assert (post(run, CHAT).status_code, post(run, CHAT).json()["error"]["code"]) == (500, "engine_failed")
        engine.breaks = False
        assert post(run, CHAT).json()["usage"]["completion_tokens"] == 5
        assert httpx.get(run.url + "/health").status_code == 200
        run.wait_until_idle()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_engine_dies_requests_and_health_say_so():
    engine = FakeEngine()
    with running(engine, fake_config()) as run:
        assert httpx.get(run.url + "/health").json() == {"status": "ok"}
        engine.breaks = True
        assert [post(run, CHAT).status_code for _ in range(MOST_FAILED_STEPS)] == [500] * MOST_FAILED_STEPS
        run.wait_until(lambda: httpx.get(run.url + "/health").status_code == 503)
        assert post(run, CHAT).json()["error"]["code"] == "engine_died"


def test_stopping_finishes_the_replies_under_way_and_then_ends():
    engine = FakeEngine(words=20, seconds_per_step=0.02)
    with running(engine, fake_config(slots=1, queue=1)) as run:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(post(run, CHAT))) for _ in range(2)]
        for thread in threads:
            thread.start()
        run.wait_until(lambda: len(run.scheduler._jobs) == 2)
        run.stop()
        run.thread.join(timeout=HANG_SECONDS)
        assert not run.thread.is_alive()
        for thread in threads:
            thread.join()
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [20, 20]


def test_what_is_not_done_within_the_grace_is_answered_503():
    engine = FakeEngine(words=10**9, seconds_per_step=0.001)
    with running(engine, fake_config(grace=0.2, max_tokens=10**9)) as run:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(post(run, CHAT)))
        thread.start()
        run.wait_until(lambda: run.scheduler.active == 1)
        run.stop()
        thread.join(timeout=HANG_SECONDS)
        run.thread.join(timeout=HANG_SECONDS)
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "stopping"
