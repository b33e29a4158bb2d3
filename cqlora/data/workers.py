"""Work spread over threads or processes, its results in the order of the tasks."""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib import import_module
from itertools import chain
from multiprocessing import resource_tracker
from types import ModuleType, TracebackType
from typing import Any, TypeVar

from cqlora.errors import DataError
from cqlora.system.signals import die_with

Task = TypeVar("Task")
Result = TypeVar("Result")

THREAD_TASKS = 12
"""Tasks done in this process before others are started: for less work, that would cost more than it saves."""

_NOT_FOR_PROCESSES = (signal.SIGINT, signal.SIGUSR2)
"""SIGTERM is how their pool ends them."""
_SECONDS_TO_HEAR = 1.0


def count_workers(workers: int | None) -> int:
    """`workers`, or the cores that this process may use."""
    if workers is not None:
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Maps functions over tasks, in order, on as many cores as it is given.

    One worker does everything on one core. More begin as two threads, which overlap the tokenizer's work with
    Python's; after THREAD_TASKS tasks processes are started, which take over as soon as they are there, and are
    kept for the next map, until the end of the `with` block.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        self._started: list[Future[ModuleType]] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map_in_order(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Pairs of task and result, with few tasks under way at a time.

        Raises:
            DataError: a worker process died.
        """
        if self.count == 1:
            use_one_core()
            yield from ((task, function(task)) for task in tasks)
            return
        remaining = iter(tasks)
        with ThreadPoolExecutor(2) as threads:
            yield from in_order(threads, function, self._until_processes(function, remaining), 2)
        for task in remaining:
            yield from self._map_in_processes(function, chain([task], remaining))

    def start_early(self, function: Callable[..., Any]) -> None:
        """Start processes that will map `function`, which are ready the sooner for it; one worker needs none."""
        if self.count > 1:
            self._start_processes(function)

    def _until_processes(self, function: Callable[[Task], Result], tasks: Iterator[Task]) -> Iterator[Task]:
        """The tasks until processes have started, or failed to."""
        done = 0
        while not (self._started and all(each.done() for each in self._started)):
            task = next(tasks, None)
            if task is None:
                return
            if done == THREAD_TASKS and self._pool is None:
                self._start_processes(function)
            yield task
            done += 1

    def _start_processes(self, function: Callable[..., Any]) -> None:
        """Start them, importing what they will need."""
        # Spawned, not forked: this process may hold threads of a tokenizer, of torch or of Arrow.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(
            self.count, mp_context=context, initializer=start_process, initargs=(os.getpid(),)
        )
        module = (function.func if isinstance(function, partial) else function).__module__
        # Before the mask, which it would lift.
        resource_tracker.ensure_running()
        # A terminal's Ctrl-C reaches them too; when to end is said by this process alone. They inherit the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_PROCESSES)
        try:
            self._started = [self._pool.submit(import_module, module) for _ in range(self.count)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _map_in_processes(
        self, function: Callable[[Task], Result], tasks: Iterator[Task]
    ) -> Iterator[tuple[Task, Result]]:
        """As map_in_order, all of it in processes."""
        assert self._pool is not None, "tasks are left only when processes have started"
        try:
            yield from in_order(self._pool, function, tasks, 2 * self.count)
        except BrokenProcessPool:
            # A signal to all of a job's processes may have ended one before this one hears it.
            time.sleep(_SECONDS_TO_HEAR)
            raise DataError(
                "a worker process died while preparing data, most likely out of memory; try data.workers=1."
            ) from None


def in_order(
    pool: Executor, function: Callable[[Task], Result], tasks: Iterable[Task], at_once: int
) -> Iterator[tuple[Task, Result]]:
    """Submit tasks to a pool, at most `at_once` ahead of the result that is waited for."""
    under_way: deque[tuple[Task, Future[Result]]] = deque()
    for task in tasks:
        under_way.append((task, pool.submit(function, task)))
        if len(under_way) > at_once:
            done, future = under_way.popleft()
            yield done, future.result()
    for done, future in under_way:
        yield done, future.result()


def start_process(parent: int) -> None:
    """One core, for as long as the process that it works for lives."""
    die_with(parent)
    use_one_core()


def use_one_core() -> None:
    """Keep this process's tokenizer to one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
