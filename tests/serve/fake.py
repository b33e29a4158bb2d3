"""An engine that says `w0 w1 w2 …`, as slowly as asked, and holds still or breaks on command."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from cqlora.errors import DataError
from cqlora.inference.requests import Sampling
from cqlora.serve.config import ServeConfig
from cqlora.serve.listener import bind, url_of
from cqlora.serve.server import Server
from tests.conftest import HANG_SECONDS


@dataclass(eq=False)
class FakeReply:
    prompt_ids: list[int]
    sampling: Sampling
    reused_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    failure: Exception | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)


@dataclass
class FakeBatch:
    engine: "FakeEngine"
    slots: int
    replies: list[FakeReply] = field(default_factory=list)
    most_together: int = 0

    @property
    def free_slots(self) -> int:
        return self.slots - len(self.replies)

    def admit(self, prompt_ids: list[int], sampling: Sampling) -> FakeReply:
        if not self.free_slots:
            raise RuntimeError("no slot is free")
        if self.engine.refuses and self.engine.refuses in "".join(map(chr, prompt_ids)):
            raise DataError("this prompt is refused.")
        reply = FakeReply(prompt_ids, sampling)
        self.replies.append(reply)
        self.engine.admitted.append("".join(map(chr, prompt_ids)))
        return reply

    def step(self) -> list[tuple[FakeReply, str]]:
        assert self.engine.open.wait(timeout=HANG_SECONDS)
        time.sleep(self.engine.seconds_per_step)
        if self.engine.breaks:
            raise ValueError("a CUDA error, say")
        self.most_together = max(self.most_together, len(self.replies))
        self.engine.steps.append(sum(reply.prompt_tokens for reply in self.replies if not reply.completion_tokens))
        produced = []
        for reply in list(self.replies):
            text = self.engine.word or f"w{reply.completion_tokens} "
            reply.completion_tokens += 1
            if reply.completion_tokens >= self.engine.words:
                reply.finish_reason = "stop"
            elif reply.completion_tokens >= reply.sampling.max_new_tokens:
                reply.finish_reason = "length"
            if reply.finish_reason:
                self.release(reply)
            produced.append((reply, text))
        return produced

    def release(self, reply: FakeReply) -> None:
        if reply in self.replies:
            self.replies.remove(reply)


class FakeEngine:
    """`open` is cleared to hold every step still, `breaks` is set to let the next one raise."""

    name = "fake"
    system_prompt = ""

    def __init__(
        self, words: int = 5, seconds_per_step: float = 0.0, max_length: int = 4096, refuses: str = "", word: str = ""
    ):
        self.words = words
        self.seconds_per_step = seconds_per_step
        self.max_length = max_length
        self.refuses = refuses
        self.word = word
        self.open = threading.Event()
        self.open.set()
        self.breaks = False
        self.admitted: list[str] = []
        self.steps: list[int] = []
        """Prompt tokens that were new in each step."""
        self.batch: FakeBatch | None = None

    def open_batch(self, slots: int) -> FakeBatch:
        self.batch = FakeBatch(self, slots)
        return self.batch

    def encode_messages(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode_text("|".join(f"{message['role']}:{message['content']}" for message in messages))

    def encode_text(self, text: str) -> list[int]:
        return list(map(ord, text))


def fake_config(**fields: object) -> ServeConfig:
    """A configuration for a server that has its engine already."""
    return ServeConfig(**{"base": ".", "port": 0, "slots": 2, "queue": 2, "grace": HANG_SECONDS, **fields})


class Running:
    """A server in a thread."""

    def __init__(self, server: Server, url: str, thread: threading.Thread) -> None:
        self.server = server
        self.url = url
        self.thread = thread
        self.scheduler = server.service.scheduler

    def stop(self) -> None:
        """As SIGTERM."""
        self.server._hear(15)

    def wait_until(self, true: "callable", what: str = "") -> None:
        """Poll until `true()` holds."""
        deadline = time.monotonic() + HANG_SECONDS
        while not true():
            assert time.monotonic() < deadline, what or "it never came true"
            time.sleep(0.005)

    def wait_until_idle(self) -> None:
        """Return when every slot and every place in the queue is free."""
        self.wait_until(lambda: not self.scheduler._jobs and not self.scheduler.active, "a place is still taken")


@contextlib.contextmanager
def running(engine: object, config: ServeConfig, key: str = "") -> Iterator[Running]:
    """A real server on a free port for as long as the block runs."""
    listener: socket.socket = bind(config.host, config.port)
    url = url_of(listener)
    server = Server(engine, config, key)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    run = Running(server, url, thread)
    try:
        run.wait_until(lambda: server.started)
        yield run
    finally:
        if isinstance(engine, FakeEngine):
            engine.open.set()
        server._grace = 0
        server.should_exit = True
        thread.join(timeout=HANG_SECONDS)
        assert not thread.is_alive(), "the server does not end"
