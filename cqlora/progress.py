"""What a person at a terminal sees of a run; quiet when nobody looks."""

import logging
import warnings
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.logging import RichHandler
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

console = Console(stderr=True)


def show_log() -> None:
    """Send the package's own log lines to the terminal, and no library's below a warning."""
    handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    package = logging.getLogger("cqlora")
    package.handlers = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False


class _Display:
    """A bar that shows while a block runs."""

    _bar: Progress

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class StepDisplay(_Display):
    """A bar with step, loss, tokens/s and time left, and a line for each evaluation."""

    def __init__(self, total_steps: int, is_main: bool) -> None:
        self._visible = is_main and console.is_terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._visible,
        )
        self._task: TaskID = self._bar.add_task("train", total=total_steps, told="")

    def show_step(self, row: dict[str, Any]) -> None:
        """Move the bar to a training line."""
        told = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, completed=row["step"], told=told)

    def show_evaluation(self, row: dict[str, Any]) -> None:
        """Print an evaluation line above the bar."""
        if self._visible:
            self._bar.console.print(
                f"step {row['step']:>5}  {row['source']} [dim]({row['language']})[/dim]  loss {row['loss']:.3f}  "
                f"bits/character {row['bits_per_character']:.3f}  bits/byte {row['bits_per_byte']:.3f}"
            )


class StageDisplay(_Display):
    """A bar for each named part of a preparation, such as reading and encoding."""

    def __init__(self, is_main: bool) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not (is_main and console.is_terminal),
        )
        self._tasks: dict[str, TaskID] = {}

    def show(self, part: str, done: int, total: int | None) -> None:
        """Move a part's bar."""
        if part not in self._tasks:
            self._tasks[part] = self._bar.add_task(part, total=total)
        self._bar.update(self._tasks[part], completed=done, total=total)
