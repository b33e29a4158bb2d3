"""What /metrics tells, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cqlora.serve.scheduler import Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTED_PATHS = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/"}
"""Others are counted together: their number is for clients to choose."""
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server; nothing of a prompt or a reply goes into them."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "cqlora_requests", "Responses by path and status", ["path", "status"], registry=registry
        )
        self.abandoned = Counter("cqlora_abandoned", "Clients that went before their reply's end", registry=registry)
        self.prompt_tokens = Counter("cqlora_prompt_tokens", "Tokens of prompts taken in", registry=registry)
        self.reused_tokens = Counter(
            "cqlora_reused_tokens", "Tokens of prompts that the prefix cache held", registry=registry
        )
        self.completion_tokens = Counter("cqlora_completion_tokens", "Tokens generated", registry=registry)
        self.first_token = Histogram(
            "cqlora_first_token_seconds", "From request to first token", buckets=_SECONDS, registry=registry
        )
        self.duration = Histogram(
            "cqlora_reply_seconds", "From request to last token", buckets=_SECONDS, registry=registry
        )
        slots = Gauge("cqlora_slots", "Replies that can be generated together", registry=registry)
        slots.set(scheduler.slots)
        active = Gauge("cqlora_slots_active", "Slots that are taken", registry=registry)
        active.set_function(lambda: scheduler.active)
        waiting = Gauge("cqlora_queue_waiting", "Requests that wait for a slot", registry=registry)
        waiting.set_function(lambda: scheduler.waiting)

    def render(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)


class CountResponses:
    """Counts every response by its status, in front of everything else."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._requests = metrics.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in COUNTED_PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)
