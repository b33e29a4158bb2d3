"""One connection, which neither waits for ever for what its client sends nor keeps others from being served.

uvicorn has a limit for idle connections between two requests alone, and answers 503 to everybody, /health among
them, once there are too many of any kind.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cqlora.serve.failure import error_body

HEADER_SECONDS = 10.0
"""From the first byte, or from connecting, to the end of the headers."""
BODY_SECONDS = 60.0
_SLICE_BYTES = 16 << 10
"""h11 takes ten microseconds for each chunk of a body, however small: more at once would hold up the others."""
_LEAST_BYTES_PER_LINE = 8
"""A chunked body with more line ends than one in so many bytes comes in chunks of a few bytes: each has two."""


class Connection(H11Protocol):
    """uvicorn's connection with time limits; of more than `limit_concurrency`, those that wait longest are closed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._most = self.limit_concurrency
        self.limit_concurrency = None
        self._timer: asyncio.TimerHandle | None = None
        self._waits_for = ""
        self._waits_since = 0.0
        self._answered = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers; make room where there are too many connections."""
        super().connection_made(transport)
        self._wait_for("headers", HEADER_SECONDS)
        if self._most is not None and len(self.connections) > self._most:
            others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
            waiting = [other for other in others if other.waits] or [self]
            # Those who were answered before, as who asks for /health now and then, are not the slow ones.
            longest = min(waiting, key=lambda other: (other._answered, other._waits_since))
            self.connections.discard(longest)
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time limit."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in what came, a slice at a time."""
        for start in range(0, len(data), _SLICE_BYTES):
            if self.transport.is_closing():
                return
            received = data[start : start + _SLICE_BYTES]
            super().data_received(received)
            self._follow(received)

    def on_response_complete(self) -> None:
        """Between two requests the connection waits as well, by uvicorn's clock."""
        self._waits_since, self._answered = self.loop.time(), True
        super().on_response_complete()

    @property
    def waits(self) -> bool:
        """Whether nothing is being done for the client: its request is not all here, or is answered."""
        return self.cycle is None or self.cycle.more_body or self.cycle.response_complete

    def _follow(self, received: bytes) -> None:
        """Set the time limit of what is still to come."""
        if self.conn.their_state is h11.IDLE:
            self._wait_for("headers", HEADER_SECONDS)
        elif self.conn.their_state is h11.SEND_BODY:
            self._wait_for("body", BODY_SECONDS)
            if received.count(b"\r\n") * _LEAST_BYTES_PER_LINE > max(len(received), 1024):
                self._give_up(400, "the body comes in chunks of a few bytes; send it in larger ones.", "tiny_chunks")
        else:
            self._stop_waiting()

    def _wait_for(self, what: str, seconds: float) -> None:
        if self._waits_for == what:
            return
        self._stop_waiting()
        self._waits_for, self._waits_since = what, self.loop.time()
        sentence = f"the {what} did not come within {seconds:g} s."
        self._timer = self.loop.call_later(seconds, self._give_up, 408, sentence, "request_timeout")

    def _stop_waiting(self) -> None:
        self._waits_for = ""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self, status: int, sentence: str, code: str) -> None:
        """Say why where nothing has been said yet, and close."""
        self._stop_waiting()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = json.dumps(error_body(status, sentence, code)).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            if self.cycle is not None:
                self.cycle.disconnected = True
        self.transport.close()
