"""A chat template in Jinja, in the sandbox that transformers runs it in, with a bound on what it may do.

Templates come along with models from anywhere: one that fails, loops or asks for what the sandbox denies ends in one
sentence. What they see is what transformers shows them, but for the clock: `strftime_now` formats one fixed day, so
that the same data gives the same tokens tomorrow.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from threading import local
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from cqlora.errors import ModelError
from cqlora.system.documents import first_words

TODAY = datetime(2024, 7, 26)
"""What templates are told of the date: the day that Llama 3's own takes where there is no clock."""

_MOST_STEPS = 1_000_000
"""Passes through loops in one rendering; a conversation of a thousand turns needs a few thousand."""
_MOST_CHARACTERS = 1 << 26
_MOST_BITS = 1 << 16

Message = Mapping[str, Any]


class TemplateRefusal(Exception):
    """A template cannot write a conversation; the message is the template's own, or what is wrong with it."""


class ChatTemplate:
    """A compiled template.

    Raises:
        ModelError: it is no Jinja, or larger than any template.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._template = compile_bounded(source)
        except (jinja2.TemplateError, MemoryError, RecursionError, SyntaxError, ValueError) as error:
            raise ModelError(
                f"a chat template cannot be read as Jinja ({first_words(error)}); mend it, or choose another with "
                "stage.template=NAME."
            ) from error

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
            TemplateRefusal: the template raised, or exceeded its bounds.
        """
        _STEPS.left = _MOST_STEPS
        try:
            text = self._template.render(
                messages=list(messages),
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **names,
                **switches,
            )
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError,
                TypeError, ValueError) as error:  # fmt: skip
            raise TemplateRefusal(first_words(error)) from error
        if len(text) > _MOST_CHARACTERS:
            raise TemplateRefusal(f"it writes more than {_MOST_CHARACTERS:,} characters")
        return text


@lru_cache(maxsize=32)
def compile_bounded(source: str) -> jinja2.Template:
    """The template, each pass through a loop of it counted."""
    environment = _Sandbox()
    tree = environment.parse(source)
    for loop in list(tree.find_all(nodes.For)):
        counted = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        counted.set_environment(environment)
        loop.iter = counted
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.globals)


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
    """transformers' environment of chat templates, in which products and powers are bounded too."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self.filters |= {"tojson": _to_json, "counted": _count_steps}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": TODAY.strftime,
            "namespace": _NamesWithoutUnderscores,
        }

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int) and hasattr(value, "__len__") and len(value) * times > _MOST_CHARACTERS:
                raise OverflowError("it repeats a text too often")
        are_integers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and are_integers and left.bit_length() * right > _MOST_BITS:
            raise OverflowError("it computes a number too large")
        return super().call_binop(context, operator, left, right)


class _Steps(local):
    """Passes through loops that the rendering of this thread may still make."""

    left = _MOST_STEPS


_STEPS = _Steps()


def _count_steps(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _STEPS.left -= 1
        if _STEPS.left < 0:
            raise TemplateRefusal(f"it loops more than {_MOST_STEPS:,} times")
        yield value


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
