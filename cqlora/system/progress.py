"""What a person sees of a run: bars at a terminal; in a log, what begins and at least a line a minute."""

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True)
logger = logging.getLogger(__name__)

T = TypeVar("T")

LOG_WIDTH = 160
"""Columns of a table in a log, which has no width of its own."""
SECONDS_BETWEEN_LINES = 60.0
_SECONDS_BETWEEN_LOOKS = 1.0


class _PlainHandler(logging.Handler):
    """Log lines above whatever bar is shown, each on one line however long: a path is there to be copied."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(Text(self.format(record)), soft_wrap=True)


def show_log() -> None:
    """Send the package's own log lines to the terminal, and no library's below a warning."""
    handler = _PlainHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    package = logging.getLogger("cqlora")
    package.handlers = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False


def open_console(stderr: bool = False) -> Console:
    """A console for tables and paths: of the terminal's width, and in a log wide enough that nothing is folded."""
    probe = Console(stderr=stderr)
    return probe if probe.is_terminal else Console(stderr=stderr, width=LOG_WIDTH)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Lines:
    """Which lines a log gets of work under way: one when it begins, and one a minute until it ends."""

    def __init__(
        self,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        nothing_new: str = "{} so far",
    ) -> None:
        self._write = write
        self._clock = clock
        self._nothing_new = nothing_new
        """What is added to a line that is repeated; `{}` is the time since it was true."""
        self._state = ""
        self._since = self._last_line = clock()
        self._is_shown = True

    def begin(self, state: str) -> None:
        """Something else is under way, which is a line at once."""
        self.update(state, at_once=True)

    def update(self, state: str, at_once: bool = False) -> None:
        """How things stand, which is a line when a minute has passed without one."""
        self._state, self._since, self._is_shown = state, self._clock(), False
        self.look(at_once)

    def look(self, at_once: bool = False) -> None:
        """Tell how things stand, if a minute has passed without a line."""
        now = self._clock()
        if not self._state or (not at_once and now - self._last_line < SECONDS_BETWEEN_LINES):
            return
        again = f" ({self._nothing_new.format(duration(now - self._since))})" if self._is_shown else ""
        self._write(self._state + again)
        self._last_line, self._is_shown = now, True


class Pace:
    """How long what is left of the steps will take, by those done since the one at which it is made."""

    def __init__(self, total: int, step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._started, self._first = clock(), step

    def seconds_left(self, step: int) -> float:
        """At the end of a later step; what is between steps, evaluations and saving among it, counts in."""
        return (self._clock() - self._started) / (step - self._first) * (self._total - step)


class _Display:
    """Shows while a block runs: a bar at a terminal, lines in a log, which a thread keeps coming."""

    _bar: Progress

    def __init__(self, bar: Progress, is_main: bool, nothing_new: str = "{} so far") -> None:
        self._bar = bar
        self._bar.disable = not (is_main and console.is_terminal)
        self._is_main = is_main
        self.lines = None if console.is_terminal or not is_main else Lines(logger.info, nothing_new=nothing_new)
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._bar.start()
        self._ended = threading.Event()
        if self.lines is not None:
            threading.Thread(target=keep_looking, args=(self.lines, self._ended), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._bar.stop()


def keep_looking(lines: Lines, ended: threading.Event) -> None:
    """Keep lines coming of work that reports nothing itself for minutes, such as loading weights."""
    while not ended.wait(_SECONDS_BETWEEN_LOOKS):
        lines.look()


@contextmanager
def show_part(what: str, is_main: bool = True) -> Iterator[None]:
    """Say what is under way while a block runs."""
    bar = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console,
                   transient=True)  # fmt: skip
    with _Display(bar, is_main) as display:
        bar.add_task(what, total=None)
        if display.lines is not None:
            display.lines.begin(what)
        yield


class StepDisplay(_Display):
    """Step, loss, tokens/s and time left, and a line for each evaluation."""

    def __init__(self, total_steps: int, is_main: bool) -> None:
        bar = Progress(
            SpinnerColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        super().__init__(bar, is_main, nothing_new="next step: {} so far")
        self._total = total_steps
        self._pace: Pace | None = None
        self._task: TaskID = self._bar.add_task("train", total=total_steps, figures="")

    def show_step(self, row: dict[str, Any]) -> None:
        """Move the bar to a training line; a log has the first step, the last, and one a minute."""
        step = row["step"]
        figures = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, figures=figures)
        if self.lines is None:
            return
        line = f"step {step} of {self._total}  {figures}"
        if self._pace is None:
            # The first step also warms up, and would promise a later end.
            self._pace = Pace(self._total, step)
            self.lines.update(line, at_once=True)
        else:
            left = f"{line}  {duration(self._pace.seconds_left(step))} left"
            self.lines.update(left if step < self._total else line, at_once=step == self._total)

    def follow(self, source: str, batches: Sequence[T]) -> Iterator[T]:
        """The batches of a source's held-out text, while they are evaluated."""
        for number, batch in enumerate(batches, 1):
            state = f"evaluating {source}: batch {number} of {len(batches)}"
            self._bar.update(self._task, figures=state)
            if self.lines is not None:
                self.lines.update(state)
            yield batch

    def show_evaluation(self, row: dict[str, Any]) -> None:
        """Tell what an evaluation has found of one source."""
        if self._is_main:
            logger.info(
                "step %d  %s (%s)  loss %.3f  bits/character %.3f  bits/byte %.3f",
                *(row["step"], row["source"], row["language"]),
                *(row["loss"], row["bits_per_character"], row["bits_per_byte"]),
            )


class StageDisplay(_Display):
    """A bar for each named part of a preparation, such as reading and encoding."""

    def __init__(self, is_main: bool, first: str = "opening the token cache") -> None:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        super().__init__(bar, is_main)
        if self.lines is not None:
            self.lines.update(first)
        self._tasks: dict[str, TaskID] = {}

    def show(self, part: str, done: int, total: int | None) -> None:
        """Move a part's bar."""
        if part not in self._tasks:
            self._tasks[part] = self._bar.add_task(part, total=total)
            if self.lines is not None:
                self.lines.begin(part)
        self._bar.update(self._tasks[part], completed=done, total=total)
        if self.lines is not None:
            self.lines.update(f"{part}: {done:,}" + (f" of {total:,}" if total else ""))
