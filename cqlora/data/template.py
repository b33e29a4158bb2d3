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

MOST_SECONDS = 5.0
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
        self.owner = 0
        """A process that was forked has not its parent's child."""

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
        if self.child is None or self.owner != os.getpid():
            self._start()
        assert self.child is not None and self.child.stdin is not None and self.child.stdout is not None
        answer = b""
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.write(request)
            self.child.stdin.flush()
            answer = self.child.stdout.readline()
        if answer.endswith(b"\n"):
            return answer
        ended, self.child = self.child.wait(), None
        if ended == -signal.SIGPROF:
            raise ModelError(
                _out_of_bounds(f"computes for {MOST_SECONDS:g} seconds more than {SECONDS_EACH:g} for each text")
            )
        raise ModelError(_out_of_bounds(f"ended the process that it runs in (code {ended})"))

    def _start(self) -> None:
        # A session of its own: Ctrl-C at a terminal is for the program that asks. It ends with its input.
        self.child = subprocess.Popen(
            [sys.executable, "-P", _PROGRAM, str(MOST_BYTES), str(MOST_SECONDS), str(SECONDS_EACH)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.owner = os.getpid()

    def close(self) -> None:
        """End the process."""
        with self.lock:
            if self.child is not None and self.owner == os.getpid():
                self.child.communicate()
            self.child = None


_PROCESS = _Process()
atexit.register(_PROCESS.close)


def _out_of_bounds(what: str) -> str:
    return f"the chat template {what}; mend it, or choose another with stage.template=NAME."
