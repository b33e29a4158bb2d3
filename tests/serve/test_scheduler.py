"""The queue and the thread behind it, with an engine that can be held still."""

import asyncio

import pytest

from cqlora.inference.requests import Sampling
from cqlora.serve.failure import Failure
from cqlora.serve.scheduler import MOST_FAILED_STEPS, PROMPT_TOKENS_PER_STEP, Job, Scheduler
from tests.conftest import HANG_SECONDS
from tests.serve.fake import FakeEngine

SAMPLING = Sampling(max_new_tokens=100)


def with_scheduler(engine, test, slots=2, queue=2, timeout=HANG_SECONDS):
    """Run the coroutine `test(scheduler)` beside a scheduler that ends with it."""

    async def main():
        scheduler = Scheduler(engine.open_batch(slots), slots, queue, timeout)
        scheduler.start()
        try:
            return await asyncio.wait_for(test(scheduler), HANG_SECONDS)
        finally:
            engine.open.set()
            scheduler.stop(0)
            assert await asyncio.to_thread(scheduler.join, HANG_SECONDS)

    return asyncio.run(main())


async def read(job: Job) -> str:
    return "".join([delta.text async for delta in job.deltas()])


def prompt(text: str) -> list[int]:
    return list(map(ord, text))


async def until(true):
    while not true():
        await asyncio.sleep(0.002)


def test_requests_that_come_together_are_generated_together():
    engine = FakeEngine(words=4)

    async def test(scheduler):
        engine.open.clear()
        jobs = [scheduler.submit(prompt(name), SAMPLING) for name in "abc"]
        engine.open.set()
        assert await asyncio.gather(*map(read, jobs)) == ["w0 w1 w2 w3 "] * 3

    with_scheduler(engine, test, slots=3)
    assert engine.batch.most_together == 3


def test_one_request_too_many_is_refused_at_once_and_a_place_that_is_left_is_given_again():
    engine = FakeEngine(words=4)

    async def test(scheduler):
        engine.open.clear()
        jobs = [scheduler.submit(prompt(str(number)), SAMPLING) for number in range(4)]
        for _ in range(3):
            with pytest.raises(Failure) as refused:
                scheduler.submit(prompt("too many"), SAMPLING)
            assert (refused.value.status_code, refused.value.code) == (429, "queue_full")
            assert int(refused.value.headers["Retry-After"]) > 0
        scheduler.abandon(jobs.pop())
        jobs.append(scheduler.submit(prompt("in its place"), SAMPLING))
        engine.open.set()
        await asyncio.gather(*map(read, jobs))

    with_scheduler(engine, test)
    assert engine.admitted == ["0", "1", "2", "in its place"]


def test_an_abandoned_reply_frees_its_slot_for_the_next_in_the_queue():
    engine = FakeEngine(words=10**9, seconds_per_step=0.001)

    async def test(scheduler):
        endless = [scheduler.submit(prompt(name), Sampling(max_new_tokens=10**9)) for name in "ab"]
        next_one = scheduler.submit(prompt("c"), Sampling(max_new_tokens=3))
        await until(lambda: scheduler.active == 2)
        scheduler.abandon(endless[0])
        assert await read(next_one) == "w0 w1 w2 "
        scheduler.abandon(endless[1])
        await until(lambda: scheduler.active == 0)
        assert not scheduler._jobs

    with_scheduler(engine, test)


def test_requests_are_admitted_in_the_order_they_came_however_long():
    engine = FakeEngine(words=2)

    async def test(scheduler):
        engine.open.clear()
        first = scheduler.submit(prompt("first"), SAMPLING)
        await until(lambda: scheduler.active == 1)
        names = ["L" * 2000, "short", "M" * 1500, "tiny"]
        jobs = [scheduler.submit(prompt(name), SAMPLING) for name in names]
        engine.open.set()
        await asyncio.gather(*map(read, [first, *jobs]))
        assert engine.admitted == ["first", *names]

    with_scheduler(engine, test, slots=2, queue=10)


def test_replies_under_way_never_wait_for_more_than_one_step_of_prompt_tokens():
    engine = FakeEngine(words=50)
    longest = 300

    async def test(scheduler):
        engine.open.clear()
        jobs = [scheduler.submit(prompt("p" * longest), SAMPLING) for _ in range(12)]
        engine.open.set()
        await asyncio.gather(*map(read, jobs))

    with_scheduler(engine, test, slots=12, queue=0)
    assert engine.batch.most_together == 12
    assert max(engine.steps) <= PROMPT_TOKENS_PER_STEP


def test_a_prompt_that_the_engine_refuses_fails_alone():
    engine = FakeEngine(words=2, refuses="bad")

    async def test(scheduler):
        jobs = [scheduler.submit(prompt(name), SAMPLING) for name in ("good", "bad", "fine")]
        with pytest.raises(Failure, match="refused") as refused:
            await read(jobs[1])
        assert refused.value.status_code == 400
        assert await read(jobs[0]) == await read(jobs[2]) == "w0 w1 "
        assert not scheduler._jobs

    with_scheduler(engine, test, slots=1, queue=5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_step_after_step_fails_the_engine_is_dead_and_every_later_request_is_refused():
    engine = FakeEngine(words=100)

    async def test(scheduler):
        engine.open.clear()
        jobs = [scheduler.submit(prompt(str(number)), SAMPLING) for number in range(4)]
        engine.breaks = True
        engine.open.set()
        for ended in await asyncio.gather(*map(read, jobs), return_exceptions=True):
            assert (ended.status_code, ended.code) == (500, "engine_failed")
        scheduler.check_health()
        for number in range(MOST_FAILED_STEPS - 2):
            with pytest.raises(Failure):
                await read(scheduler.submit(prompt(str(number)), SAMPLING))
        await until(lambda: scheduler._failure is not None)
        with pytest.raises(Failure) as refused:
            scheduler.submit(prompt("later"), SAMPLING)
        assert refused.value.code == "engine_died"
        with pytest.raises(Failure):
            scheduler.check_health()

    with_scheduler(engine, test)


def test_a_step_that_hangs_ends_at_the_time_limit_and_shows_in_the_health():
    engine = FakeEngine()

    async def test(scheduler):
        scheduler.check_health()
        engine.open.clear()
        with pytest.raises(Failure) as late:
            await read(scheduler.submit(prompt("a"), SAMPLING))
        assert (late.value.status_code, late.value.code) == (504, "timeout")
        with pytest.raises(Failure) as ill:
            scheduler.check_health()
        assert ill.value.code == "stalled"

    with_scheduler(engine, test, timeout=0.1)


def test_stopping_takes_no_more_and_lets_the_others_finish():
    engine = FakeEngine(words=5)

    async def test(scheduler):
        engine.open.clear()
        jobs = [scheduler.submit(prompt(name), SAMPLING) for name in "abc"]
        scheduler.stop(grace=HANG_SECONDS)
        with pytest.raises(Failure) as refused:
            scheduler.submit(prompt("late"), SAMPLING)
        assert (refused.value.status_code, refused.value.code) == (503, "stopping")
        engine.open.set()
        assert await asyncio.gather(*map(read, jobs)) == ["w0 w1 w2 w3 w4 "] * 3

    with_scheduler(engine, test)


def test_what_is_not_done_when_the_grace_is_over_is_reported():
    engine = FakeEngine(words=10**9, seconds_per_step=0.001)

    async def test(scheduler):
        jobs = [scheduler.submit(prompt(name), Sampling(max_new_tokens=10**9)) for name in "abc"]
        await until(lambda: scheduler.active == 2)
        scheduler.stop(grace=0.05)
        for ended in await asyncio.gather(*map(read, jobs), return_exceptions=True):
            assert (ended.status_code, ended.code) == (503, "stopping")

    with_scheduler(engine, test)


def test_an_idle_scheduler_waits_without_stepping():
    engine = FakeEngine()

    async def test(scheduler):
        await read(scheduler.submit(prompt("a"), SAMPLING))
        steps = len(engine.steps)
        await asyncio.sleep(0.05)
        assert len(engine.steps) == steps == 5

    with_scheduler(engine, test)
