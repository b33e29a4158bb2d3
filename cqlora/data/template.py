"""A chat template in Jinja, run by a process of its own within bounds that it cannot get around.

Templates come along with models from anywhere: one that fails, never ends, or asks for what the sandbox denies ends in
one sentence.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from cqlora.errors import ModelError
from cqlora.system.documents import one_line

MOST_SECONDS = 2.0
"""Of processor time, beyond what each text is allowed."""
SECONDS_EACH = 0.02
"""For a text, however short; a conversation of a thousand turns takes less."""
MOST_BYTES = 1 << 30
"""Of address space, Python's own included."""

_PROGRAM = Path(__file__).with_name("template_process.py")

Message = Mapping[str, Any]


class TemplateRefusal(Exception):
    """A template cannot write a conversation; the message is the template's own, or what is wrong with it."""


class ChatTemplate:
    """A template that has been compiled.

    Raises:
        ModelError: it is no Jinja, or cannot be compiled within the bounds.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            _PROCESS.ask([source])
        except TemplateRefusal as refusal:
            raise ModelError(
                f"a chat template cannot be read as Jinja ({refusal}); mend it, or choose another with "
                "stage.template=NAME."
            ) from refusal

    def render(
        self,
        messages: Sequence[Message],
        names: Mapping[str, str],
        tools: Sequence[Any] = (),
        add_generation_prompt: bool = False,
        **switches: Any,
    ) -> str:
        """The text of a conversation, as `apply_chat_template` writes it.

        Args:
            messages: role, content, and what else the template reads.
            names: the texts of the tokenizer's special tokens, such as `bos_token`.
            tools: JSON schemas of the tools that may be called.
            add_generation_prompt: end where the assistant's next words come.
            switches: what a template of this kind reads beside, such as `enable_thinking`.

        Raises:
            TemplateRefusal: the template raised.
            ModelError: it exceeded its bounds.
        """
        values = {
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **names,
            **switches,
        }
        return _PROCESS.ask([self.source, values])


class _Process:
    """The process of template_process.py, started where one is asked for, anew where the last one was ended."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.child: subprocess.Popen[bytes] | None = None
        # A process that was forked has not its parent's child, and a thread that it lacks may have held the lock.
        os.register_at_fork(after_in_child=self.forget)

    def ask(self, request: list[Any]) -> str:
        """The answer to a request.

        Raises:
            TemplateRefusal: the template raised.
            ModelError: it exceeded its bounds.
        """
        with self.lock:
            answer = self._exchange(json.dumps(request).encode() + b"\n")
        text, *wrong = json.loads(answer)
        if not wrong:
            return str(text)
        kind, reason = wrong
        if kind == "memory":
            raise ModelError(_out_of_bounds(f"takes more than {MOST_BYTES >> 30} GiB of memory"))
        raise TemplateRefusal(one_line(reason))

    def _exchange(self, request: bytes) -> bytes:
        child = self.child = self.child or self._start()
        assert child.stdin is not None and child.stdout is not None
        answer = b""
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(request)
                child.stdin.flush()
                answer = child.stdout.readline()
        except BaseException:
            # Interrupted: what it answers yet is for nobody.
            self._end(child)
            raise
        if answer.endswith(b"\n"):
            return answer
        if self._end(child) == -signal.SIGPROF:
            raise ModelError(
                _out_of_bounds(f"computes for {MOST_SECONDS:g} seconds more than {SECONDS_EACH:g} for each text")
            )
        raise ModelError(_out_of_bounds(f"ended the process that it runs in (code {child.returncode})"))

    def _end(self, child: subprocess.Popen[bytes]) -> int:
        """End a process that has not ended by itself, and return its code."""
        self.child = None
        assert child.stdin is not None and child.stdout is not None
        child.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=1)
        child.kill()
        return child.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C at a terminal is for the program that asks. It ends with its input.
        return subprocess.Popen(
            [sys.executable, "-P", _PROGRAM, str(MOST_BYTES), str(MOST_SECONDS), str(SECONDS_EACH)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def forget(self) -> None:
        """Leave the process to whoever started it."""
        self.lock, self.child = Lock(), None

    def close(self) -> None:
        """End the process."""
        with self.lock:
            if self.child is not None:
                self._end(self.child)


_PROCESS = _Process()
atexit.register(_PROCESS.close)


def _out_of_bounds(what: str) -> str:
    return f"the chat template {what}; mend it, or choose another with stage.template=NAME."
