"""The signals that ask for an end: what they do while a block runs; ending with the process that started this one."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cqlora.errors import Preempted

_PR_SET_PDEATHSIG = 1
ASKING_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""SIGUSR2 is how Slurm warns a submitted job of its time limit."""

INTERRUPTED = 130
"""Exit code after a second Ctrl-C, as a shell gives it."""

_asked: list[int] = []
"""Signals that this process has heard in the blocks below, oldest first; forgotten when the outermost ends."""
_blocks: list[None] = []
"""As many as there are blocks around what runs."""


class Stopped(BaseException):
    """A signal came where nothing is under way that must be finished first.

    Not an Exception, so that no library that expects failures swallows it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name


@contextmanager
def hear_signals(hear: Callable[[int], None]) -> Iterator[None]:
    """Call `hear` with the number of each signal that asks for an end; afterwards they do what they did before.

    Outside the main thread, where a notebook's or a server's code may run, no signal is heard.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, lambda received, frame: hear(received)) for number in ASKING_TO_END}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let the first signal raise Stopped in the block, wherever it is; a second Ctrl-C is a KeyboardInterrupt."""
    with _listen(_stop):
        yield


@contextmanager
def preempt_on_signals(again: Callable[[], str]) -> Iterator[None]:
    """As stop_on_signals, and leave the block as Preempted, where `again` tells how to go on.

    Raises:
        Preempted: a signal came.
    """
    with stop_on_signals():
        try:
            yield
        except Stopped as stopped:
            raise Preempted(f"stopped by {stopped.name}; {again()}") from None


@contextmanager
def finish_first(tell: Callable[[int], None] = lambda number: None) -> Iterator[list[int]]:
    """While the block runs, only write signals into the list that it is given, and `tell`; it ends when it is done.

    One whose exception was swallowed before, in a destructor say, is in the list from the beginning. A second Ctrl-C
    is a KeyboardInterrupt.
    """

    def hear(number: int) -> None:
        _note(number)
        tell(number)

    with _listen(hear):
        yield _asked


@contextmanager
def _listen(hear: Callable[[int], None]) -> Iterator[None]:
    """Hear signals where they are heard at all, which is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _blocks.append(None)
    try:
        with hear_signals(hear):
            yield
    finally:
        _blocks.pop()
        if not _blocks:
            _asked.clear()


def _note(number: int) -> bool:
    """Write a signal down; whether it is the first. A second Ctrl-C interrupts."""
    first = not _asked
    _asked.append(number)
    if not first and number == signal.SIGINT:
        raise KeyboardInterrupt
    return first


def _stop(number: int) -> None:
    # Slurm and others repeat themselves: only a person's second Ctrl-C cuts short what the first set going.
    if _note(number):
        raise Stopped(number)


def die_with(parent: int) -> None:
    """Be killed when the process `parent`, which started this one, ends, be it by kill -9 (Linux, prctl(2))."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It ended before the kernel was asked.
        os.kill(os.getpid(), signal.SIGKILL)
