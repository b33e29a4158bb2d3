"""Hearing SIGTERM and SIGINT for as long as a block runs."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def hear_signals(hear: Callable[[int], None]) -> Iterator[None]:
    """Call `hear` with the number of each SIGTERM and SIGINT; afterwards they do what they did before."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda received, frame: hear(received)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
