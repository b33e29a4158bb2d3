"""What /health takes beside the floor: the same question to a bare server, from the same client at the same time.

    python benchmarks/health.py URL SECONDS

The bare server is uvicorn with an application that returns a constant, in a process of its own. Each is asked in turn
over a connection that stays open, ten times a second, so that whatever else the machine does falls on both; the
client is a process that does nothing else.
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

PERIOD_SECONDS = 0.1


@dataclass
class Answers:
    """Seconds that each answer took, of ours and of the bare server."""

    ours: list[float]
    floor: list[float]

    def __str__(self) -> str:
        return f"/health {describe(self.ours)}; bare server {describe(self.floor)}"


def describe(seconds: list[float]) -> str:
    """How many, and the median, 99% and most in milliseconds."""
    ordered = sorted(seconds)
    median, late, most = (1e3 * ordered[place] for place in (len(ordered) // 2, len(ordered) * 99 // 100, -1))
    return f"{len(ordered)} times, median {median:.1f} ms, 99% {late:.1f}, most {most:.1f}"


@contextmanager
def watching(url: str) -> Iterator[Answers]:
    """Ask for as long as the block runs; the answers are there after it."""
    answers = Answers([], [])
    with subprocess.Popen([sys.executable, __file__, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None and client.stdin is not None
        client.stdout.readline()
        yield answers
        printed, _ = client.communicate()
    answers.ours, answers.floor = json.loads(printed)


def main() -> None:
    """Be the client until standard input ends, or for SECONDS."""
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else None
    with bare_server() as floor:
        clients = [connect(sys.argv[1]), connect(floor)]
        took: list[list[float]] = [[], []]
        for client in clients:
            ask(client)
        if seconds is None:
            os.set_blocking(0, False)
            print("asking", flush=True)
        until = time.monotonic() + (seconds or 1e9)
        while time.monotonic() < until and (seconds is not None or is_open()):
            for client, into in zip(clients, took, strict=True):
                into.append(ask(client))
            time.sleep(max(0.0, PERIOD_SECONDS - took[0][-1] - took[1][-1]))
    print(json.dumps(took) if seconds is None else Answers(*took))


def is_open() -> bool:
    """Whether standard input has not ended."""
    try:
        return os.read(0, 1) != b""
    except BlockingIOError:
        return True


def connect(url: str) -> http.client.HTTPConnection:
    """A connection that stays open."""
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)


def ask(client: http.client.HTTPConnection) -> float:
    """Seconds to the whole answer."""
    began = time.monotonic()
    try:
        client.request("GET", "/health")
        response = client.getresponse()
        response.read()
        assert response.status == 200, response.status
    except (http.client.HTTPException, OSError) as error:
        print(f"  failed: {error!r}", file=sys.stderr, flush=True)
        client.close()
    return time.monotonic() - began


async def constant(scope, receive, send) -> None:
    """An application that says yes to everything."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"15")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"status":"ok"}'})


@contextmanager
def bare_server() -> Iterator[str]:
    """Its address for as long as the block runs."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        command = [sys.executable, "-m", "uvicorn", "--app-dir", os.path.dirname(__file__), "health:constant",
                   "--http", "h11", "--lifespan", "off", "--log-level", "error",
                   "--fd", str(door.fileno())]  # fmt: skip
        with subprocess.Popen(command, pass_fds=[door.fileno()], stdin=subprocess.DEVNULL) as server:
            try:
                yield f"http://127.0.0.1:{door.getsockname()[1]}"
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
