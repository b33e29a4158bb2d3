"""What a request must get past before it is read: the Host rule, the key, the size limit."""

import hmac
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cqlora.serve.failure import Failure
from cqlora.serve.listener import is_loopback
from cqlora.serve.requests import shorten

_OPEN = ("/health", "/")
_OPEN_FOLDER = "/page/"
_HOST = re.compile(r"(?P<name>\[[^\]]*\]|[^:]*)(:\d*)?$")


class Guard:
    """Stands in front of the application.

    Without a key only programs of this machine may ask, and no web page that a browser has open: its requests
    carry its own name as Host where the name was made to point here (DNS rebinding), and otherwise fail the
    browser's preflight, since bodies must be application/json and no other origin is allowed.
    """

    def __init__(self, app: ASGIApp, key: str, most_bytes: int) -> None:
        self._app = app
        self._key = key.encode()
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check(scope["path"], headers)
            declared = headers.get("content-length", "")
            if declared.isdigit() and int(declared) > self._most_bytes:
                raise _too_large(self._most_bytes)
        except Failure as failure:
            await failure.response()(scope, receive, send)
            return
        await self._app(scope, _limited(receive, self._most_bytes), send)

    def _check(self, path: str, headers: Headers) -> None:
        if not self._key:
            host = headers.get("host", "")
            parts = _HOST.match(host)
            if parts is None or not is_loopback(parts["name"]):
                raise Failure(421, f"Host {shorten(host)!r} is not this server's; ask for localhost.", "wrong_host")
            return
        if path in _OPEN or path.startswith(_OPEN_FOLDER):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        if scheme.lower() != "bearer" or not right:
            raise Failure(401, "the API key is missing or wrong; send Authorization: Bearer KEY.", "invalid_api_key")


def _limited(receive: Receive, most_bytes: int) -> Receive:
    """`receive`, for a body that says nothing of its size."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > most_bytes:
            raise _too_large(most_bytes)
        return message

    return counted


def _too_large(most_bytes: int) -> Failure:
    sentence = f"the body is larger than {most_bytes >> 10} KiB, which is more than the model can hold; send less."
    return Failure(413, sentence, "body_too_large")
