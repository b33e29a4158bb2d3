"""The routes: OpenAI's, health, metrics, and the chat page."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from cqlora.serve.body import body_limit
from cqlora.serve.failure import Failure, error_body
from cqlora.serve.guard import Guard
from cqlora.serve.metrics import CONTENT_TYPE, CountResponses
from cqlora.serve.requests import ChatRequest, CompletionRequest, shorten
from cqlora.serve.service import Service

PAGE_FOLDER = Path(__file__).parent / "page"
_MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Nothing but this server's own files runs, and nothing is fetched from elsewhere."""


def build_app(service: Service, key: str) -> FastAPI:
    """The application; starting it starts the service's scheduler."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        service.scheduler.stop(grace=0)

    # FastAPI's own documentation pages load scripts from elsewhere, and bodies are read by body.py.
    app = FastAPI(title="cqlora", lifespan=lifespan, openapi_url=None)
    add_api(app, service)
    add_upkeep(app, service)
    add_page(app)
    add_failures(app)
    app.add_middleware(Guard, key=key, most_bytes=body_limit(service.engine.max_length))
    app.add_middleware(CountResponses, metrics=service.metrics)
    return app


def add_api(app: FastAPI, service: Service) -> None:
    """OpenAI's routes."""
    model = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "cqlora",
        "max_model_len": service.engine.max_length,
        "max_tokens": service.max_tokens,
        "system_prompt": service.engine.system_prompt,
    }

    @app.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> Response:
        return await service.respond(http, ChatRequest)

    @app.post("/v1/completions")
    async def complete(http: HttpRequest) -> Response:
        return await service.respond(http, CompletionRequest)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        service.check_name(name)
        return model


def add_upkeep(app: FastAPI, service: Service) -> None:
    """What those who run the server ask."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        service.scheduler.check_health()
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)


def add_page(app: FastAPI) -> None:
    """The chat page, from files that are read once."""
    files = {
        file.relative_to(PAGE_FOLDER).as_posix(): (file.read_bytes(), _MEDIA_TYPES[file.suffix])
        for file in PAGE_FOLDER.rglob("*.*")
    }

    @app.get("/page/{name:path}")
    async def page_file(name: str) -> Response:
        if name not in files:
            raise Failure(404, f"there is no page file {shorten(repr(name))}.", "not_found")
        content, media_type = files[name]
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    @app.get("/")
    async def page() -> Response:
        return await page_file("index.html")


def add_failures(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(HTTPException)
    async def failed(http: HttpRequest, error: HTTPException) -> JSONResponse:
        if isinstance(error, Failure):
            return error.response()
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        sentence = f"{http.method} {shorten(http.url.path)} is not served ({error.detail})."
        return JSONResponse(error_body(error.status_code, sentence, code), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broke(http: HttpRequest, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, "the server failed on this request.", "internal_error"), 500)
