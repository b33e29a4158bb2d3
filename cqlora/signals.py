"""Hearing the signals that ask for an end while a block runs; ending with the process that started this one."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1
_ASKING_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""SIGUSR2 is how Slurm warns a submitted job of its time limit."""


@contextmanager
def hear_signals(hear: Callable[[int], None]) -> Iterator[None]:
    """Call `hear` with the number of each signal that asks for an end; afterwards they do what they did before."""
    previous = {number: signal.signal(number, lambda received, frame: hear(received)) for number in _ASKING_TO_END}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def die_with(parent: int) -> None:
    """Be killed when the process `parent`, which started this one, ends, be it by kill -9 (Linux, prctl(2))."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It ended before the kernel was asked.
        os.kill(os.getpid(), signal.SIGKILL)
