"""Clients that send slowly, or nothing, or come in hundreds: each is let go, and others are served meanwhile."""

import contextlib
import json
import socket

import httpx
import pytest

from cqlora.serve.connection import Connection
from tests.serve.fake import FakeEngine, Running, fake_config, running

BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(run: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(run.url.rsplit(":", 1)[1])), timeout=10)


def read_all(client: socket.socket) -> bytes:
    """What came until the server closed."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            received += part
    return received


def ask_health(run: Running) -> int:
    return httpx.get(run.url + "/health", timeout=10).status_code


@pytest.mark.parametrize(
    "sent",
    [[b""], [b"G"], [HEAD], [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /he"]],
    ids=["nothing", "a letter", "some headers", "the beginning of a second request"],
)
def test_headers_that_do_not_come_are_not_waited_for(sent, monkeypatch):
    monkeypatch.setattr("cqlora.serve.connection.HEADER_SECONDS", 0.2)
    with running(FakeEngine(), fake_config()) as run, connect(run) as client:
        for part in sent[:-1]:
            client.sendall(part)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.sendall(sent[-1])
        message = read_all(client)
        assert b"HTTP/1.1 408" in message and b"the headers did not come" in message
        assert ask_health(run) == 200


@pytest.mark.parametrize("length", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
def test_a_body_that_does_not_come_is_not_waited_for(length, monkeypatch):
    monkeypatch.setattr("cqlora.serve.connection.BODY_SECONDS", 0.2)
    with running(FakeEngine(), fake_config()) as run, connect(run) as client:
        client.sendall(HEAD + length + b"\r\n\r\n" + (b"3\r\nabc\r\n" if b"chunked" in length else b"abc"))
        message = read_all(client)
        assert message.startswith(b"HTTP/1.1 408") and b"the body did not come" in message
        run.wait_until(lambda: not run.server.server_state.tasks, "its task still waits")
        assert ask_health(run) == 200


def test_a_body_that_goes_on_after_the_refusal_is_not_read_for_ever(monkeypatch):
    monkeypatch.setattr("cqlora.serve.connection.BODY_SECONDS", 0.2)
    with running(FakeEngine(), fake_config()) as run, connect(run) as client:
        client.sendall(HEAD + b"Content-Length: 99999999\r\n\r\nabc")
        assert read_all(client).count(b"HTTP/1.1") == 1


def test_a_time_limit_ends_with_what_it_is_for(monkeypatch):
    """A reply that takes longer than headers and body may is not cut off."""
    monkeypatch.setattr("cqlora.serve.connection.HEADER_SECONDS", 0.1)
    monkeypatch.setattr("cqlora.serve.connection.BODY_SECONDS", 0.1)
    engine = FakeEngine(words=40, seconds_per_step=0.01)
    with running(engine, fake_config()) as run, httpx.Client() as client:
        for _ in range(2):
            assert client.post(run.url + "/v1/chat/completions", content=BODY, headers=JSON).status_code == 200


JSON = {"Content-Type": "application/json"}


def test_hundreds_of_silent_connections_keep_nobody_from_being_served():
    engine = FakeEngine(words=10**9, seconds_per_step=0.005)
    with running(engine, fake_config(slots=1, queue=1, max_tokens=10**9)) as run, contextlib.ExitStack() as opened:
        most = run.server.config.limit_concurrency
        assert most < 100
        watcher = opened.enter_context(httpx.Client(timeout=10))
        assert watcher.get(run.url + "/health").status_code == 200
        reply = opened.enter_context(
            httpx.stream(
                "POST", run.url + "/v1/chat/completions", content=BODY[:-1] + b', "stream": true}', headers=JSON
            )
        )
        lines = reply.iter_lines()
        next(lines)
        for number in range(3 * most):
            client = opened.enter_context(connect(run))
            client.sendall(HEAD if number % 2 else HEAD + b"Content-Length: 50\r\n\r\n{")
            if number % 20 == 0:
                assert watcher.get(run.url + "/health").status_code == 200, (
                    "who was answered before keeps its connection"
                )
        assert ask_health(run) == 200
        run.wait_until(lambda: len(run.server.server_state.connections) <= most)
        assert "data" in "".join(next(lines) for _ in range(10)), "a reply under way goes on"


def test_a_body_in_tiny_chunks_is_refused_and_one_in_whole_chunks_is_taken():
    taken = []

    class Counted(Connection):
        def data_received(self, data):
            before = self.cycle
            super().data_received(data)
            if before is not None:
                taken.append(len(data))

    with running(FakeEngine(), fake_config()) as run:
        run.server.config.http_protocol_class = Counted
        with connect(run) as client:
            with contextlib.suppress(OSError):
                client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 500_000)
            message = read_all(client)
            assert message == b"" or (message.startswith(b"HTTP/1.1 400") and b"chunks of a few bytes" in message)
        assert sum(taken) < 1_500_000, "it was closed, not read to its end"
        parts = (BODY[start : start + 20] for start in range(0, len(BODY), 20))
        assert httpx.post(run.url + "/v1/chat/completions", content=parts, headers=JSON).status_code == 200
