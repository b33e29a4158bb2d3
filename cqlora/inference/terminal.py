"""A conversation in a terminal: lines in, replies streamed out, commands that begin with a slash."""

import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from cqlora.data.records import Turn
from cqlora.errors import ConfigError, DataError
from cqlora.inference.requests import Sampling, repair_text

HELP = "/reset forgets the conversation, /save FILE appends it to a file, /exit or Ctrl-D ends; Ctrl-C stops a reply."
_KEPT_CONTROLS = "\n\t"


class Speaker(Protocol):
    """What chat needs of the engine."""

    def stream(self, messages: list[dict[str, str]], **sampling: Any) -> Iterator[str]:
        """The reply as it comes."""


class Terminal(Protocol):
    """Where lines come from and text goes."""

    def read(self) -> str:
        """The next line; EOFError at the end of input, KeyboardInterrupt at Ctrl-C."""

    def write(self, text: str, end: str = "\n") -> None:
        """Show text at once."""


class Conversation:
    """What has been said so far."""

    def __init__(self, system: str = "") -> None:
        self._system = system
        self.turns: list[Turn] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system's message."""
        self.turns = [Turn("system", self._system)] if self._system else []

    def messages(self) -> list[dict[str, str]]:
        """As the engine takes them."""
        return [{"role": turn.role, "text": turn.text} for turn in self.turns]

    def save(self, file: Path) -> None:
        """Append to a file as one line of the `dialog` source, which a later run can train on.

        Raises:
            DataError: the file cannot be written.
        """
        line = repair_text(json.dumps(self.messages(), ensure_ascii=False))
        try:
            with file.expanduser().open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        # RuntimeError: ~NAME of nobody; ValueError: a name that no file can have.
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{file} cannot be written ({reason}); give another file.") from error


def talk(
    conversation: Conversation, engine: Callable[[], Speaker], sampling: Sampling, terminal: Terminal, hint: str = ""
) -> None:
    """Read lines until the input ends; `engine` waits for the model, and raises what its loading raised."""
    with suppress(EOFError):
        terminal.write(HELP)
        if hint:
            terminal.write(hint)
        read_lines(conversation, engine, sampling, terminal)


def read_lines(
    conversation: Conversation, engine: Callable[[], Speaker], sampling: Sampling, terminal: Terminal
) -> None:
    """Obey and answer line after line.

    Raises:
        EOFError: the input has ended, or nobody reads the output.
    """
    while True:
        try:
            line = terminal.read().strip()
            if line == "/exit":
                return
            if line.startswith("/"):
                terminal.write(printable(obey(line, conversation)))
            elif line:
                answer(line, conversation, engine, sampling, terminal)
        except KeyboardInterrupt:
            continue


def obey(command: str, conversation: Conversation) -> str:
    """Do what a command says; return what to tell."""
    name, _, argument = command.partition(" ")
    if name == "/reset":
        conversation.reset()
        return "The conversation is forgotten."
    if name == "/save" and argument.strip():
        if not any(turn.role == "assistant" for turn in conversation.turns):
            return "Nothing has been said yet."
        try:
            conversation.save(Path(argument.strip()))
        except DataError as error:
            return f"error: {error}"
        return f"Saved to {argument.strip()}."
    return HELP


def answer(
    line: str, conversation: Conversation, engine: Callable[[], Speaker], sampling: Sampling, terminal: Terminal
) -> None:
    """Stream the reply to a line; Ctrl-C ends it and keeps what has been said.

    Raises:
        CqloraError: the model could not be loaded.
    """
    conversation.turns.append(Turn("user", repair_text(line)))
    said: list[str] = []
    try:
        speaker = engine()
        for text in speaker.stream(conversation.messages(), **asdict(sampling)):
            said.append(text)
            terminal.write(printable(text), end="")
        terminal.write("")
    except KeyboardInterrupt:
        terminal.write(" [stopped]")
    except DataError as error:
        terminal.write(f"error: {error} /reset begins anew.")
    if said:
        conversation.turns.append(Turn("assistant", "".join(said)))
    else:
        conversation.turns.pop()


def printable(text: str) -> str:
    """Text without control characters, so that no reply moves the cursor or changes the terminal.

    Halves of a surrogate pair, which no terminal takes, become U+FFFD.
    """
    return "".join(c for c in repair_text(text) if c in _KEPT_CONTROLS or unicodedata.category(c) != "Cc")


class ConsoleOutput:
    """Writes to standard output as it is, without markup or wrapping of its own."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that is not UTF-8 shows ? for what it lacks.
            sys.stdout.reconfigure(errors="replace")
        self._console = Console(highlight=False, markup=False, emoji=False)

    def write(self, text: str, end: str = "\n") -> None:
        """See Terminal.

        Raises:
            EOFError: nobody reads any more.
        """
        try:
            self._console.out(text, end=end, highlight=False)
            self._console.file.flush()
        except BrokenPipeError as error:
            # What is still held would be tried once more as the program ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise EOFError from error


class PromptTerminal(ConsoleOutput):
    """A person at a terminal: a line editor that knows how wide characters are, with a history."""

    def __init__(self) -> None:
        super().__init__()
        from prompt_toolkit import PromptSession

        self._session: Any = PromptSession()

    def read(self) -> str:
        """See Terminal."""
        line: str = self._session.prompt("> ")
        return line


class PipedTerminal(ConsoleOutput):
    """Lines from a file or another program."""

    def read(self) -> str:
        """See Terminal.

        Raises:
            DataError: the line is not UTF-8.
        """
        line = sys.stdin.buffer.readline() if sys.stdin else b""
        if not line:
            raise EOFError
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError("standard input is not UTF-8; convert it with iconv first.") from error


def open_terminal() -> Terminal:
    """The terminal that standard input is.

    Raises:
        ConfigError: there is no standard output.
    """
    if sys.stdout is None:
        raise ConfigError("standard output is closed, so there is nowhere to show a reply; leave it open.")
    return PromptTerminal() if sys.stdin and sys.stdin.isatty() else PipedTerminal()
