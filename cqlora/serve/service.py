"""From a request that parsed to its reply: encode, queue, follow, and let go whatever happens."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cqlora.errors import CqloraError
from cqlora.serve.body import parse
from cqlora.serve.config import ServeConfig
from cqlora.serve.failure import Failure
from cqlora.serve.metrics import Metrics
from cqlora.serve.requests import ChatRequest, CompletionRequest, shorten
from cqlora.serve.responses import DONE, Answer, event
from cqlora.serve.scheduler import Job, ReplyDelta, Scheduler

if TYPE_CHECKING:
    from cqlora.engine import LlamaEngine

SECONDS_TO_READ_THE_END = 30.0
_READERS = 2
"""Bodies that are read at once: more would take the processor from the replies under way."""
_LEAST_TOKENS_OF_A_MESSAGE = 4
"""Its two control tokens, its role, and a line end."""
_JSON = re.compile(r"application/([\w.-]+\+)?json\s*(;|$)", re.IGNORECASE)
_LOG = logging.getLogger(__name__)


class Service:
    """One model, its queue and its counters."""

    def __init__(self, engine: "LlamaEngine", scheduler: Scheduler, config: ServeConfig) -> None:
        self.engine = engine
        self.scheduler = scheduler
        self.metrics = Metrics(scheduler)
        self.name = config.name or engine.name
        self.max_tokens = config.max_tokens
        self.created = int(time.time())
        self._readers = CapacityLimiter(_READERS)

    async def respond(self, http: HttpRequest, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        """The response to a request, whole or as a stream.

        Raises:
            Failure: the request cannot be served.
        """
        self.scheduler.check_open()
        if not _JSON.match(http.headers.get("content-type", "")):
            raise Failure(400, "the body is no JSON object sent as application/json.", "invalid_json")
        try:
            body = await http.body()
        except ClientDisconnect:
            return Response(status_code=499)
        # Parsing and encoding take their time, in which /health and the streams go on.
        asked, prompt_ids = await run_sync(self.read, body, kind, limiter=self._readers)
        job = self.scheduler.submit(prompt_ids, asked.sampling(self.max_tokens))
        exchange = Exchange(self, job, isinstance(asked, ChatRequest))
        if asked.stream:
            return ExchangeStream(exchange, asked.wants_usage)
        return await exchange.respond_whole(http)

    def read(
        self, body: bytes, kind: type[ChatRequest] | type[CompletionRequest]
    ) -> tuple[ChatRequest | CompletionRequest, list[int]]:
        """A request's fields and its prompt's ids.

        Raises:
            Failure: the body is no such request, or asks for what is not served.
        """
        asked = parse(body, kind)
        self.check_name(asked.model)
        asked.sampling(self.max_tokens)
        return asked, self.encode(asked)

    def check_name(self, name: str | None) -> None:
        """Whether it is this model that is asked for; a request that names none means it.

        Raises:
            Failure: 404.
        """
        if name is not None and name != self.name:
            raise Failure(
                404, f"model {shorten(repr(name))} is not served here; ask for {self.name!r}.", "model_not_found"
            )

    def encode(self, asked: ChatRequest | CompletionRequest) -> list[int]:
        """The prompt's ids; control tokens in a text stay text.

        Raises:
            Failure: no prompt, or one that leaves no room for a reply.
        """
        try:
            if isinstance(asked, ChatRequest):
                self.check_length(_LEAST_TOKENS_OF_A_MESSAGE * len(asked.messages), "at least ")
                ids = self.engine.encode_messages([message.turn() for message in asked.messages])
            else:
                ids = self.engine.encode_text(asked.text())
        except CqloraError as error:
            raise Failure(400, str(error), "invalid_value") from error
        self.check_length(len(ids))
        return ids

    def check_length(self, tokens: int, bound: str = "") -> None:
        """Whether a prompt of so many tokens leaves room for a reply.

        Raises:
            Failure: 400.
        """
        if tokens >= self.engine.max_length:
            raise Failure(
                400,
                f"the prompt has {bound}{tokens} tokens and the model holds {self.engine.max_length} with the reply; "
                "send less.",
                "context_length_exceeded",
            )


class Exchange:
    """One job and the client that listens to it."""

    def __init__(self, service: Service, job: Job, chat: bool) -> None:
        self._scheduler = service.scheduler
        self._metrics = service.metrics
        self.job = job
        self._answer = Answer(service.name, len(job.prompt_ids), chat)
        self._began = time.monotonic()
        self._metrics.prompt_tokens.inc(len(job.prompt_ids))

    async def follow(self) -> AsyncIterator[ReplyDelta]:
        """The job's deltas, counted on its way."""
        async for delta in self.job.deltas():
            if not self._answer.completion_tokens:
                self._metrics.first_token.observe(time.monotonic() - self._began)
                assert self.job.reply is not None
                self._metrics.reused_tokens.inc(self.job.reply.reused_tokens)
            self._metrics.completion_tokens.inc(delta.completion_tokens - self._answer.completion_tokens)
            self._answer.completion_tokens = delta.completion_tokens
            yield delta

    def let_go(self) -> None:
        """Free the job's place if it still has one: called once, however the exchange ended."""
        self._scheduler.abandon(self.job)
        if self.job.ended:
            self._metrics.duration.observe(time.monotonic() - self._began)
        else:
            self._metrics.abandoned.inc()

    async def respond_whole(self, http: HttpRequest) -> Response:
        """Wait for the whole reply, or for the client to go away."""
        reply = asyncio.create_task(self._collect())
        gone = asyncio.create_task(_wait_until_gone(http))
        try:
            await asyncio.wait({reply, gone}, return_when=asyncio.FIRST_COMPLETED)
            # Nobody reads the response to a client that has gone.
            return JSONResponse(reply.result()) if reply.done() else Response(status_code=499)
        finally:
            reply.cancel()
            gone.cancel()
            self.let_go()

    async def _collect(self) -> dict[str, object]:
        texts = []
        reason = None
        async for delta in self.follow():
            texts.append(delta.text)
            reason = delta.finish_reason
        assert reason is not None
        return self._answer.whole("".join(texts), reason)

    async def events(self, wants_usage: bool) -> AsyncIterator[str]:
        """The reply as server-sent events; a failure is one of them, and then the stream ends without [DONE]."""
        yield self._answer.opening()
        try:
            async for delta in self.follow():
                if delta.text:
                    yield self._answer.delta(delta.text, None)
                if delta.finish_reason:
                    yield self._answer.delta("", delta.finish_reason)
        except Failure as failure:
            yield event(failure.body())
            return
        if wants_usage:
            yield self._answer.closing_usage()
        yield DONE


class ExchangeStream(StreamingResponse):
    """A stream that frees its place when it ends, when the client goes, and when the client stops reading."""

    def __init__(self, exchange: Exchange, wants_usage: bool) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(exchange.events(wants_usage), media_type="text/event-stream", headers=headers)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            async with asyncio.timeout_at(self._exchange.job.deadline + SECONDS_TO_READ_THE_END):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            # Its reply has long ended: the connection is cut, since the response stays unfinished.
            _LOG.warning("a client stopped reading its stream")
        finally:
            self._exchange.let_go()


async def _wait_until_gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
