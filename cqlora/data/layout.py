"""Where the words of a conversation stand in what a template makes of it, and the proof that its label mask is right.

A template is rendered once for each form that a conversation can have (who speaks, who thinks, what is called), with
placeholders for the words. What it must show there, or the conversation is refused:

- The text that a model is given before each reply, the turns before it with the generation prompt, is the beginning
  of the whole conversation, so that a reply is learned after exactly what it will be asked with. This is proven of
  prompts and not of finished turns, since templates that leave earlier thoughts out (Qwen 3) write a reply otherwise
  once another question follows, and never what it was asked with.
- Between the prompt and the reply's words stands nothing but a thought, and after them a control token, the same one
  for every reply. Labels are what the model has to write itself: its thought, its words, its calls, that token.
- Every text stands there once, in order, as it is; thoughts may be left out.

A rendering of the real words must then equal the placeholders' with the words put in.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from cqlora.data.records import Turn
from cqlora.data.template import ChatTemplate, TemplateRefusal
from cqlora.data.turn_forms import Forms, TurnForm, messages_of, take_apart
from cqlora.errors import ModelError

_SLOT = re.compile("\ue000(\\d+)\ue001")
_THOUGHT_BLOCK = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_LIKELY_FORMS = 4096
_EXCHANGE = (TurnForm("user"), TurnForm("assistant"))
_PROBE_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}


class Control(NamedTuple):
    """A control token that the template writes."""

    token: str
    label: bool


class Segment(NamedTuple):
    """What stands between two control tokens; numbers are texts of the conversation."""

    context: tuple[str | int, ...]
    trained: tuple[str | int, ...]
    """After the context."""


Parts = tuple[Control | Segment, ...]


class Layout(NamedTuple):
    """A conversation's text without its words."""

    parts: Parts
    reply_ends: tuple[int, ...] = ()
    """For each reply, the number of parts up to its end token."""

    def pieces(self) -> Iterator[str | int]:
        """The whole text; numbers are texts of the conversation."""
        for part in self.parts:
            yield from (part.token,) if isinstance(part, Control) else part.context + part.trained

    def fill(self, texts: Sequence[str]) -> str:
        """The whole text with the conversation's in their places."""
        return fill(self.pieces(), texts)


def fill(pieces: Iterable[str | int], texts: Sequence[str]) -> str:
    """The pieces with the conversation's texts in their places."""
    return "".join(texts[piece] if isinstance(piece, int) else piece for piece in pieces)


@dataclass(frozen=True, slots=True)
class Written:
    """What a template makes of a form, with placeholders for the words."""

    forms: Forms
    text: str

    @property
    def slots(self) -> dict[int, int]:
        """Where each placeholder begins."""
        return {int(match[1]): match.start() for match in _SLOT.finditer(self.text)}

    def slots_of(self, turn: int) -> list[int]:
        """The numbers of a turn's texts, the thought's before the words'."""
        first = sum(form.texts for form in self.forms[:turn])
        return list(range(first, first + self.forms[turn].texts))

    def turn_at(self, place: int) -> int:
        """The turn whose words stand at a place of the text, or are the next."""
        slots = self.slots
        for turn in range(len(self.forms)):
            ends = [slots[slot] + len(placeholder(slot)) for slot in self.slots_of(turn) if slot in slots]
            if ends and place < max(ends):
                return turn
        return len(self.forms) - 1

    def require_texts(self) -> None:
        """Raise TemplateRefusal unless every text but a thought stands here once, in order."""
        found = [int(match[1]) for match in _SLOT.finditer(self.text)]
        for turn, form in enumerate(self.forms):
            slots = self.slots_of(turn)
            if any(slot not in found for slot in slots[form.thinks :]):
                raise TemplateRefusal(f"it leaves out the words of turn {turn + 1}")
            if any(found.count(slot) > 1 for slot in slots):
                raise TemplateRefusal(f"it repeats the words of turn {turn + 1}")
        if found != sorted(found):
            raise TemplateRefusal("it does not write the turns in order")


def placeholder(slot: int) -> str:
    """What stands for a text of this number."""
    return f"\ue000{slot}\ue001"


class Typesetter:
    """A template with the special tokens of one tokenizer.

    Args:
        template: the template.
        names: the texts of the special tokens, as templates see them.
        controls: the texts of the tokens that no message can write.
        masks_thoughts: thoughts are context.
    """

    def __init__(
        self, template: ChatTemplate, names: Mapping[str, str], controls: frozenset[str], masks_thoughts: bool = False
    ) -> None:
        self.template = template
        self.names = names
        self.masks_thoughts = masks_thoughts
        longest_first = sorted(controls, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._split = re.compile(f"({self._controls.pattern})|{_SLOT.pattern}")
        self.lay_out = lru_cache(maxsize=_LIKELY_FORMS)(self._lay_out)
        self.lay_out_prompt = lru_cache(maxsize=_LIKELY_FORMS)(self._lay_out_prompt)

    def prove(self) -> None:
        """Raise ModelError unless two questions with their replies can be learned in the template."""
        try:
            self.lay_out(_EXCHANGE * 2)
            self.lay_out_prompt(_EXCHANGE[:1])
        except TemplateRefusal as refusal:
            raise ModelError(f"the chat template cannot be trained in: {refusal}; choose stage.template=NAME.") from (
                refusal
            )

    @cached_property
    def end(self) -> str:
        """The control token that ends a reply.

        Raises:
            TemplateRefusal: none does.
        """
        written = self._write_form(_EXCHANGE, "")
        found = self._controls.search(written.text, written.slots.get(1, len(written.text)))
        if not found:
            raise TemplateRefusal("it ends a reply with none of the tokenizer's control tokens")
        return found[0]

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template writes the tools that may be called."""
        try:
            return '"probe"' in self._write_form(_EXCHANGE[:1], json.dumps([_PROBE_TOOL]), ask=True).text
        except TemplateRefusal:
            return False

    @cached_property
    def skips_thought(self) -> bool:
        """Whether enable_thinking=false puts an empty thought behind the prompt, and changes nothing before it."""
        try:
            asked, unasked = (
                self._write_form(_EXCHANGE[:1], "", ask=True, **switches).text
                for switches in ({}, {"enable_thinking": False})
            )
        except TemplateRefusal:
            return False
        return unasked.startswith(asked) and _THOUGHT_BLOCK.fullmatch(unasked[len(asked) :]) is not None

    def arrange(self, turns: Sequence[Turn], tools: str = "") -> tuple[Layout, list[str]]:
        """The layout of a conversation, proven of its form and of its words, and its texts.

        Raises:
            TemplateRefusal: the conversation cannot be learned in the template; the sentence says which turn.
        """
        forms, texts = take_apart(turns)
        layout = self.lay_out(forms, tools)
        self._compare(forms, layout, texts, self._write(forms, texts, tools))
        return layout, texts

    def arrange_proven(self, turns: Sequence[Turn], tools: str = "") -> tuple[Layout, list[str]]:
        """As arrange, of a conversation that it has taken before: its own words are not rendered again."""
        forms, texts = take_apart(turns)
        return self.lay_out(forms, tools), texts

    def arrange_prompt(self, turns: Sequence[Turn], **switches: Any) -> tuple[Layout, list[str]]:
        """The layout of turns up to where the assistant's next words come, and their texts.

        Raises:
            TemplateRefusal: the template does not write them, or rewrites their words.
        """
        forms, texts = take_apart(turns)
        layout = self.lay_out_prompt(forms, **switches)
        self._compare(forms, layout, texts, self._write(forms, texts, "", ask=True, **switches))
        return layout, texts

    def _lay_out_prompt(self, forms: Forms, **switches: Any) -> Layout:
        written = self._write_form(forms, "", ask=True, **switches)
        written.require_texts()
        return self._split_parts(written.text, [])

    def _lay_out(self, forms: Forms, tools: str = "") -> Layout:
        for turn, form in enumerate(forms, start=1):
            if self._controls.search(form.calls):
                raise TemplateRefusal(f"the tool calls of turn {turn} hold a control token")
        if self._controls.search(tools):
            raise TemplateRefusal("the tools hold a control token")
        written = self._write_form(forms, tools)
        written.require_texts()
        if not all(tool["function"]["name"] in written.text for tool in json.loads(tools or "[]")):
            raise TemplateRefusal("it does not write which tools may be called")
        replies = [turn for turn, form in enumerate(forms) if form.role == "assistant"]
        asked = [self._write_form(forms[:turn], tools, ask=True) for turn in replies]
        spans = [self._find_reply(written, turn, prompt) for turn, prompt in zip(replies, asked, strict=True)]
        return self._split_parts(written.text, spans)

    def _find_reply(self, written: Written, turn: int, asked: Written) -> tuple[int, int]:
        """Where what trains of a reply begins, and where its end token ends.

        Raises:
            TemplateRefusal: the reply is not asked for by what stands before it, or does not stand by itself.
        """
        text, form, start = written.text, written.forms[turn], len(asked.text)
        if not text.startswith(asked.text) and not turn:
            raise TemplateRefusal("turn 1 replies to nothing")
        if not text.startswith(asked.text):
            broken = min(asked.turn_at(first_difference(text, asked.text)), turn)
            raise TemplateRefusal(f"it writes turn {broken + 1} otherwise once turn {turn + 1} has replied")
        words = written.slots[written.slots_of(turn)[-1]] if form.speaks else start
        end = text.find(self.end, words)
        if end < 0:
            raise TemplateRefusal(f"it ends turn {turn + 1} with no {self.end}")
        thought = _THOUGHT_BLOCK.match(text, start, words if form.speaks else end)
        before = text[thought.end() if thought else start : words]
        after = "" if form.calls else text[words + len(placeholder(written.slots_of(turn)[-1])) : end]
        for place, extra in (("before", before), ("after", after)):
            if form.speaks and extra.strip():
                raise TemplateRefusal(f"it writes {extra.strip()[:30]!r} {place} the words of turn {turn + 1}")
        if not all(call["name"] in text[start:end] for call in json.loads(form.calls or "[]")):
            raise TemplateRefusal(f"it does not write the tool calls of turn {turn + 1}")
        return thought.end() if thought and self.masks_thoughts else start, end + len(self.end)

    def _split_parts(self, text: str, spans: Sequence[tuple[int, int]]) -> Layout:
        """The text split at its control tokens; `spans` are the stretches that train."""
        parts: list[Control | Segment] = []
        reply_ends = []
        place, pieces = 0, (list[str | int](), list[str | int]())

        def trains(position: int) -> bool:
            return any(start <= position < end for start, end in spans)

        def add_text(end: int) -> None:
            cuts = sorted({place, end, *(start for start, _ in spans if place < start < end)})
            for begin, stop in pairwise(cuts):
                pieces[trains(begin)].append(text[begin:stop])

        for match in self._split.finditer(text):
            add_text(match.start())
            place = match.end()
            if match[1] is None:
                pieces[trains(match.start())].append(int(match[2]))
                continue
            if any(pieces):
                parts.append(Segment(tuple(pieces[0]), tuple(pieces[1])))
                pieces = ([], [])
            parts.append(Control(match[1], trains(match.start())))
            if any(place == end for _, end in spans):
                reply_ends.append(len(parts))
        add_text(len(text))
        if any(pieces):
            parts.append(Segment(tuple(pieces[0]), tuple(pieces[1])))
        return Layout(tuple(parts), tuple(reply_ends))

    def _compare(self, forms: Forms, layout: Layout, texts: Sequence[str], text: str) -> None:
        """Raise TemplateRefusal where the template treats these words otherwise than others."""
        filled = layout.fill(texts)
        if filled == text:
            return
        apart, written = first_difference(filled, text), 0
        for piece in layout.pieces():
            written += len(texts[piece] if isinstance(piece, int) else piece)
            if isinstance(piece, int) and apart < written:
                break
        else:
            piece = len(texts) - 1
        ends = accumulate(form.texts for form in forms)
        turn = next((number for number, end in enumerate(ends, start=1) if piece < end), len(forms))
        raise TemplateRefusal(f"it rewrites the words of turn {turn}")

    def _write_form(self, forms: Forms, tools: str, ask: bool = False, **switches: Any) -> Written:
        slots = range(sum(form.texts for form in forms))
        return Written(forms, self._write(forms, list(map(placeholder, slots)), tools, ask, **switches))

    def _write(self, forms: Forms, texts: Sequence[str], tools: str, ask: bool = False, **switches: Any) -> str:
        given = json.loads(tools) if tools else ()
        return self.template.render(messages_of(forms, texts), self.names, given, ask, **switches)


def first_difference(one: str, other: str) -> int:
    """The first place at which two texts are not the same."""
    return next(
        (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )
