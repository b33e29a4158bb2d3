"""Why a request gets no reply, in OpenAI's shape."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
RETRY_AFTER_SECONDS = 5


class Failure(HTTPException):
    """A sentence, an HTTP status and a code that a program can tell it by.

    FastAPI passes an HTTPException on wherever it is raised; others it takes for a body that does not parse.
    """

    def __init__(self, status: int, sentence: str, code: str) -> None:
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status in (429, 503) else None
        super().__init__(status, sentence, headers)
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients read."""
        return error_body(self.status_code, self.detail, self.code)

    def response(self) -> JSONResponse:
        """The whole HTTP response."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def error_body(status: int, sentence: str, code: str) -> dict[str, Any]:
    """`{"error": {…}}` with the type that OpenAI gives such a status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": sentence, "type": kind, "param": None, "code": code}}
