"""A turn as a chat template sees it, and its form: all of it but the words."""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from cqlora.data.records import Turn

_THOUGHT = re.compile(r"(<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)


class TurnForm(NamedTuple):
    """A turn without its words."""

    role: str
    opening: str = ""
    """`<think>` and the space after it, where a reply begins with a thought."""
    thinks: bool = False
    """Whether there are words in the thought."""
    closing: str = ""
    """`</think>` and the space around it."""
    speaks: bool = True
    """Whether there are words beside the thought."""
    calls: str = ""
    """Tool calls, as Turn has them."""

    @property
    def texts(self) -> int:
        """How many texts fill it."""
        return self.thinks + self.speaks


Forms = tuple[TurnForm, ...]


def split_thought(text: str) -> tuple[str, str, str, str]:
    """`<think>`, the thought, `</think>` and the words of a reply that begins with a thought; else the words alone."""
    match = _THOUGHT.fullmatch(text) if text.startswith("<think>") else None
    return (match[1], match[2], match[3], match[4]) if match else ("", "", "", text)


def drop_thought(turn: Turn) -> Turn:
    """The turn without the thought that a reply begins with."""
    return turn._replace(text=split_thought(turn.text)[3]) if turn.role == "assistant" else turn


def take_apart(turns: Sequence[Turn]) -> tuple[Forms, list[str]]:
    """The forms of a conversation's turns, and the texts that fill them."""
    forms, texts = [], []
    for turn in turns:
        is_reply = turn.role == "assistant"
        opening, thought, closing, words = split_thought(turn.text) if is_reply else ("", "", "", turn.text)
        forms.append(TurnForm(turn.role, opening, bool(thought), closing, bool(words), turn.calls))
        texts += [text for text in (thought, words) if text]
    return tuple(forms), texts


def messages_of(forms: Forms, texts: Sequence[str]) -> list[dict[str, Any]]:
    """A conversation as a template sees it; calls have ids, by which the turns with their results name them."""
    messages, given = [], iter(texts)
    waiting: list[dict[str, Any]] = []
    for number, form in enumerate(forms):
        thought, words = (next(given) if there else "" for there in (form.thinks, form.speaks))
        message: dict[str, Any] = {"role": form.role, "content": form.opening + thought + form.closing + words}
        if form.calls:
            message["tool_calls"] = waiting = _identify(json.loads(form.calls), number)
        elif form.role == "tool" and waiting:
            call, *waiting = waiting
            message |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
        messages.append(message)
    return messages


def _identify(calls: list[dict[str, Any]], turn: int) -> list[dict[str, Any]]:
    """Calls with ids of nine letters and digits, as Mistral's templates demand."""
    return [{"id": f"c{turn:05d}{place:03d}", "type": "function", "function": call} for place, call in enumerate(calls)]
