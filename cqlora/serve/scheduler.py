"""One thread owns the batch: it admits what waits, steps, and hands out the text; HTTP only submits and listens.

Nobody starves. Requests are admitted in the order they came, so a long prompt is never overtaken; and between
two steps no more than PROMPT_TOKENS_PER_STEP tokens of new prompts are admitted (one prompt at least), so the
replies under way wait for little more than one prompt at a time.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cqlora.errors import CqloraError
from cqlora.inference.requests import Sampling
from cqlora.serve.failure import Failure

if TYPE_CHECKING:
    from cqlora.inference.batch import ContinuousBatch, Reply

PROMPT_TOKENS_PER_STEP = 512
MOST_FAILED_STEPS = 8
"""Steps in a row that bring nothing but errors, after which the engine counts as dead: a GPU that failed stays so."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplyDelta:
    """What one step brought to one reply."""

    text: str
    completion_tokens: int
    finish_reason: str | None


class Job:
    """One request, from the queue through the batch to its last character."""

    def __init__(self, prompt_ids: list[int], sampling: Sampling, timeout: float) -> None:
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.timeout = timeout
        self.deadline = asyncio.get_running_loop().time() + timeout
        self.reply: Reply | None = None
        """Where it stands in the batch; None while it waits."""
        self.abandoned = False
        self.ended = False
        """Whether its last news was read, good or bad."""
        self._arrived = asyncio.Event()
        self._unread: ReplyDelta | None = None
        self._failure: Failure | None = None

    def tell(self, news: "ReplyDelta | Failure") -> None:
        """On the event loop: hand over what came; steps that nobody has read yet become one."""
        if isinstance(news, Failure):
            self._failure = news
        else:
            before = self._unread.text if self._unread else ""
            self._unread = ReplyDelta(before + news.text, news.completion_tokens, news.finish_reason)
        self._arrived.set()

    async def deltas(self) -> AsyncIterator[ReplyDelta]:
        """The news of one or more steps at a time, the last with its finish_reason.

        Raises:
            Failure: the reply will not come to its end, or not in time.
        """
        while not self.ended:
            await self._wait_for_news()
            unread, self._unread = self._unread, None
            self.ended = self._failure is not None or (unread is not None and unread.finish_reason is not None)
            if unread is not None:
                yield unread
            if self._failure is not None:
                raise self._failure.with_traceback(None)

    async def _wait_for_news(self) -> None:
        # Here and not in the batch's thread, so that a step that hangs ends no request's time limit.
        try:
            async with asyncio.timeout_at(self.deadline):
                await self._arrived.wait()
        except TimeoutError:
            self._failure = Failure(504, f"the reply was not done within this server's {self.timeout:g} s.", "timeout")
        self._arrived.clear()


class Scheduler:
    """A bounded queue in front of a batch, and the thread that works through both."""

    def __init__(self, batch: "ContinuousBatch", slots: int, queue: int, timeout: float) -> None:
        self._batch = batch
        self.slots = slots
        self._places = slots + queue
        self._timeout = timeout
        self._changed = threading.Condition()
        self._jobs: set[Job] = set()
        """Every one that holds a place: waiting, active, or on its way from one to the other."""
        self._waiting: deque[Job] = deque()
        self._active: dict[int, Job] = {}
        """By id of the reply; the thread's own."""
        self._stop_at: float | None = None
        self._stepping_since: float | None = None
        self._failure: Failure | None = None
        self._failed_steps = 0
        """In a row, up to the last one."""
        self._thread = threading.Thread(target=self._work, name="cqlora-batch", daemon=True)

    def start(self) -> None:
        """Begin to work; news is handed over on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests without a slot yet."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Slots that are taken."""
        return self.slots - self._batch.free_slots

    def check_open(self) -> None:
        """Whether a request would be taken now.

        Raises:
            Failure: 429 where all places are taken, 503 where the server stops or its engine has died.
        """
        if self._failure:
            raise self._failure.with_traceback(None)
        if self._stop_at is not None:
            raise Failure(503, "the server is stopping; try another, or later.", "stopping")
        if len(self._jobs) >= self._places:
            raise Failure(429, f"all {self._places} places are taken; try again in a few seconds.", "queue_full")

    def check_health(self) -> None:
        """Whether replies are being made.

        Raises:
            Failure: 503 where the engine has died or has been at one step for too long, or the server stops.
        """
        since = self._stepping_since
        if since is not None and time.monotonic() - since > self._timeout:
            raise Failure(503, f"the engine has been at one step for over {self._timeout:.0f} s.", "stalled")
        if self._failure:
            raise self._failure.with_traceback(None)
        if self._stop_at is not None:
            raise Failure(503, "the server is stopping.", "stopping")

    def submit(self, prompt_ids: list[int], sampling: Sampling) -> Job:
        """Queue a request; whoever submits it abandons it in the end, finished or not.

        Raises:
            Failure: as check_open.
        """
        with self._changed:
            self.check_open()
            job = Job(prompt_ids, sampling, self._timeout)
            self._jobs.add(job)
            self._waiting.append(job)
            self._changed.notify()
        return job

    def abandon(self, job: Job) -> None:
        """Nobody listens any more: the job's place is free before the next step. Harmless on a finished one."""
        with self._changed:
            job.abandoned = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._jobs.discard(job)

    def stop(self, grace: float) -> None:
        """Take no more requests; those under way and waiting have `grace` seconds to finish."""
        with self._changed:
            self._stop_at = time.monotonic() + grace
            self._changed.notify()

    def join(self, timeout: float) -> bool:
        """Wait for the thread to end; whether it did."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        # An exception goes on to the thread's excepthook, which prints it; what it means for clients is told here.
        end = Failure(503, "the engine has died; the server's log says why, and a restart is needed.", "engine_died")
        try:
            while self._wait_for_jobs():
                self._release_abandoned()
                self._admit()
                self._step()
            end = Failure(503, "the server stopped before the reply was done.", "stopping")
        finally:
            self._fail_all(end)

    def _fail_all(self, failure: Failure) -> None:
        """End every job, and every later one, with this failure."""
        with self._changed:
            self._failure = failure
            self._stepping_since = None
            lost: list[tuple[Job, ReplyDelta | Failure]] = [(job, failure) for job in self._jobs]
            for held in (self._jobs, self._waiting, self._active):
                held.clear()
        self._hand_out(lost)

    def _wait_for_jobs(self) -> bool:
        """Return when there is something to do; False when the work is over."""
        with self._changed:
            while not (self._waiting or self._active) and self._stop_at is None:
                self._changed.wait()
            if self._stop_at is None:
                return True
            return bool(self._waiting or self._active) and time.monotonic() < self._stop_at

    def _release_abandoned(self) -> None:
        for job in [job for job in self._active.values() if job.abandoned]:
            self._release(job)

    def _release(self, job: Job) -> None:
        assert job.reply is not None
        self._batch.release(job.reply)
        with self._changed:
            del self._active[id(job.reply)]
            self._jobs.discard(job)

    def _admit(self) -> None:
        """Fill free slots from the queue, as far as one step's share of prompt tokens goes."""
        budget = PROMPT_TOKENS_PER_STEP
        while self._batch.free_slots and (job := self._next_job(budget)):
            budget -= len(job.prompt_ids)
            try:
                reply = self._batch.admit(job.prompt_ids, job.sampling)
            except CqloraError as error:
                with self._changed:
                    self._jobs.discard(job)
                self._hand_out([(job, Failure(400, str(error), "invalid_value"))])
                continue
            job.reply = reply
            with self._changed:
                self._active[id(reply)] = job

    def _next_job(self, budget: int) -> Job | None:
        """Take the first that waits, where its prompt is within the budget or nothing was admitted before it."""
        with self._changed:
            if not self._waiting:
                return None
            untouched = budget == PROMPT_TOKENS_PER_STEP
            if not untouched and len(self._waiting[0].prompt_ids) > budget:
                return None
            return self._waiting.popleft()

    def _step(self) -> None:
        if not self._active:
            return
        self._stepping_since = time.monotonic()
        try:
            produced = self._batch.step()
        except Exception as error:  # noqa: BLE001 - whatever it is, the next replies have theirs
            _LOG.exception("a step failed; its %d replies end", len(self._active))
            produced = [(job.reply, "") for job in self._active.values() if job.reply is not None]
            for reply, _ in produced:
                reply.failure = error
                self._batch.release(reply)
        self._stepping_since = None
        news: list[tuple[Job, ReplyDelta | Failure]] = []
        with self._changed:
            for reply, text in produced:
                job = self._active[id(reply)]
                if reply.finish_reason is not None or reply.failure is not None:
                    del self._active[id(reply)]
                    self._jobs.discard(job)
                news.append((job, _news_of(reply, text)))
        self._hand_out(news)
        self._count_failures([reply.failure for reply, _ in produced])

    def _count_failures(self, failures: list[Exception | None]) -> None:
        """End the work where nothing has come of the last steps."""
        self._failed_steps = self._failed_steps + 1 if all(failures) else 0
        if self._failed_steps >= MOST_FAILED_STEPS:
            raise RuntimeError(f"the last {MOST_FAILED_STEPS} steps failed") from failures[0]

    def _hand_out(self, news: list[tuple[Job, ReplyDelta | Failure]]) -> None:
        """Wake the event loop once for all that a step brought."""
        self._loop.call_soon_threadsafe(_tell, news)


def _news_of(reply: "Reply", text: str) -> ReplyDelta | Failure:
    if reply.failure is None:
        return ReplyDelta(text, reply.completion_tokens, reply.finish_reason)
    reason = str(reply.failure) if isinstance(reply.failure, CqloraError) else "the server's log says why."
    return Failure(500, f"the engine failed at this reply: {reason}", "engine_failed")


def _tell(news: list[tuple[Job, ReplyDelta | Failure]]) -> None:
    for job, what in news:
        job.tell(what)
