"""The process that chat templates run in: Jinja in the sandbox that transformers has for them, with a bound on
memory and on processor time.

A template comes along with a model from anywhere, and no list of what it may not do is whole: it can double a text,
format a number to a billion places, or call itself twice. What the operating system bounds ends whatever it does.
This program imports nothing of cqlora.
"""

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

TODAY = datetime(2024, 7, 26)
"""What templates are told of the date: the day that Llama 3's own takes where there is no clock, so that the same data
gives the same tokens tomorrow."""

_SECONDS_A_BYTE = 1e-6
"""Of what a template is given; it takes a hundredth of that."""
_CHARACTERS_A_BYTE = 16
"""Of a text, for each byte of the template and its values; real ones write about one. Whoever asked has to read it,
which no bound on this process holds back."""
_MOST_OF_A_REASON = 1000
_BY_CHANCE = ("lipsum", "random")
"""What Jinja draws by chance: the same data would give other tokens."""


def main() -> None:
    """Answer requests, a line of JSON each, until there are no more.

    A request is [source] or [source, values]; the answer is [text] or, with the reason, [null, kind, reason].
    """
    most_bytes, most_seconds, seconds_each = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiled: dict[str, jinja2.Template] = {}
    seconds_left = most_seconds
    for line in sys.stdin.buffer:
        seconds_left = min(most_seconds, seconds_left + seconds_each + len(line) * _SECONDS_A_BYTE)
        # SIGPROF ends the process, in the middle of an operation too.
        signal.setitimer(signal.ITIMER_PROF, seconds_left)
        answer = _answer(compiled, line)
        seconds_left, _ = signal.setitimer(signal.ITIMER_PROF, 0)
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.buffer.write(answer + b"\n")
            sys.stdout.buffer.flush()


def _answer(compiled: dict[str, jinja2.Template], line: bytes) -> bytes:
    kind = "compile"
    try:
        source, *values = json.loads(line)
        if source not in compiled:
            compiled[source] = _Sandbox().from_string(source)
        kind = "render"
        text = compiled[source].render(**values[0]) if values else ""
        if len(text) > len(line) * _CHARACTERS_A_BYTE:
            raise jinja2.TemplateError(f"it writes more than {_CHARACTERS_A_BYTE} times what it is given")
        text.encode()
        return json.dumps([text]).encode()
    except MemoryError:
        return json.dumps([None, "memory", ""]).encode()
    except RecursionError:
        return json.dumps([None, kind, "it is nested too deeply"]).encode()
    except UnicodeEncodeError:
        return json.dumps([None, kind, "it writes half of a surrogate pair, which is no character"]).encode()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the template's
        return json.dumps([None, kind, str(error).strip()[:_MOST_OF_A_REASON] or type(error).__name__]).encode()


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}`, by which transformers marks replies: its body, as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _NamesWithoutUnderscores(Namespace):
    """Jinja's `namespace`, into which nothing of Python's internals can be put."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name such as {name!r}")
        super().__setitem__(name, value)


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment of chat templates, but for the clock and chance."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self.filters |= {"tojson": _to_json}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": TODAY.strftime,
            "namespace": _NamesWithoutUnderscores,
        }
        for name in _BY_CHANCE:
            self.filters.pop(name, None)
            self.globals.pop(name, None)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main()
