"""uvicorn around the application: loads the model, says where it listens, ends in order."""

import asyncio
import gc
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import uvicorn

from cqlora.serve.app import build_app
from cqlora.serve.config import ServeConfig
from cqlora.serve.connection import Connection
from cqlora.serve.listener import url_of
from cqlora.serve.scheduler import Scheduler
from cqlora.serve.service import Service
from cqlora.system.signals import hear_signals

if TYPE_CHECKING:
    from cqlora.engine import LlamaEngine

logger = logging.getLogger(__name__)

_SECONDS_TO_TELL_CLIENTS = 5
_CONNECTIONS_PER_PLACE = 2
_MORE_CONNECTIONS = 64
"""Clients keep connections open between two requests, and those who watch /health have theirs."""


def run_server(config: ServeConfig, key: str, listener: socket.socket) -> None:
    """Load the model and serve it at `listener` until a signal; replies under way may finish first."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("cqlora").setLevel(logging.INFO)
    logger.info(config.name_faster())
    server = Server(config.load_engine(), config, key)
    spare_from_collection()
    server.run(sockets=[listener])


def spare_from_collection() -> None:
    """Take what lives as long as the server out of what Python's garbage collector looks through.

    A full collection holds every thread up: over the 220,000 objects of torch and a loaded model for 80 ms and more.
    """
    gc.collect()
    gc.freeze()


class Server(uvicorn.Server):
    """Ends on SIGTERM and SIGINT with exit code 0: no new requests, `grace` seconds for the others, then 503."""

    def __init__(self, engine: "LlamaEngine", config: ServeConfig, key: str) -> None:
        scheduler = Scheduler(engine.open_batch(config.slots), config.slots, config.queue, config.timeout)
        self.service = Service(engine, scheduler, config)
        self._grace = config.grace
        settings = uvicorn.Config(
            build_app(self.service, key),
            http=Connection,
            ws="none",
            limit_concurrency=_CONNECTIONS_PER_PLACE * (config.slots + config.queue) + _MORE_CONNECTIONS,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(config.grace) + _SECONDS_TO_TELL_CLIENTS,
        )
        super().__init__(settings)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            for listener in sockets or []:
                print(
                    f"{url_of(listener)} serves {self.service.name}: a chat page, and OpenAI's API under /v1",
                    flush=True,
                )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, let the others finish, end the batch's thread."""
        self.service.scheduler.stop(self._grace)
        await super().shutdown(sockets)
        await asyncio.to_thread(self.service.scheduler.join, _SECONDS_TO_TELL_CLIENTS)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear SIGTERM and SIGINT where this is the main thread; a second one does not wait any more."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        with hear_signals(self._hear) if in_main_thread else nullcontext():
            yield

    def _hear(self, number: int) -> None:
        if self.should_exit:
            self._loop.call_soon_threadsafe(self.service.scheduler.stop, 0)
        self.should_exit = True
