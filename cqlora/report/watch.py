"""A page that follows runs which are going on: served to this machine's browsers, and to them alone."""

import socket
from html import escape
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

from cqlora.errors import CqloraError
from cqlora.report.page import describe, render
from cqlora.report.runs import to_json
from cqlora.serve.guard import Guard
from cqlora.serve.listener import url_of

_MOST_BYTES = 1 << 10
"""Of a request's body; there is none to send."""
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


def run_server(folders: list[Path], listener: socket.socket) -> None:
    """Serve the page of `folders` at `listener` until a signal."""
    settings = uvicorn.Config(build_app(folders), ws="none", log_config=None, access_log=False, server_header=False)
    print(f"{url_of(listener)} shows {', '.join(map(str, folders))}; Ctrl-C ends it.", flush=True)
    uvicorn.Server(settings).run(sockets=[listener])


def build_app(folders: list[Path]) -> FastAPI:
    """The page at `/` and its newest numbers at `/data`, behind the guard of `cqlora serve`."""
    app = FastAPI(title="cqlora report", openapi_url=None)

    # Not `async`: reading records takes a while, and runs in a thread of its own so.
    @app.get("/")
    def page() -> Response:
        try:
            content = render(describe(folders), watched=True)
        except CqloraError as error:
            return HTMLResponse(f"<!doctype html><title>cqlora</title><p>{escape(str(error))}", 503, headers=_HEADERS)
        return HTMLResponse(content.encode("utf-8", "replace"), headers=_HEADERS)

    @app.get("/data")
    def data() -> Response:
        try:
            content = to_json(describe(folders)).encode("utf-8", "replace")
        except CqloraError as error:
            return Response(to_json({"error": str(error)}), status_code=503, media_type="application/json")
        return Response(content, media_type="application/json", headers=_HEADERS)

    app.add_middleware(Guard, key="", most_bytes=_MOST_BYTES)
    return app
