"""How a run writes conversations, settled while rows are read, so that one that cannot be written is rejected there."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cqlora.config.choices import Thinking
from cqlora.data.fitting import open_with
from cqlora.data.layout import Typesetter
from cqlora.data.records import Conversation, RowError
from cqlora.data.rendered import open_typesetter
from cqlora.data.sources.fields import UNUSED
from cqlora.data.template import TemplateRefusal
from cqlora.data.turn_forms import drop_thought


@dataclass(frozen=True, slots=True)
class Wording:
    """In what template conversations are written, and what of them trains."""

    folder: str
    """The base's folder, for its tokenizer."""
    template: str = ""
    """The template in Jinja; empty is ChatML, which is written turn by turn."""
    thinking: Thinking = Thinking.train
    system_prompt: str = ""
    """Put first where a conversation brings no system message."""

    def settle(self, conversation: Conversation, counts: Counter[str]) -> Conversation:
        """The conversation as it is trained.

        Raises:
            RowError: the template has no place for it.
        """
        if self.thinking is Thinking.drop:
            conversation = drop_thoughts(conversation, counts)
        setter = open_setter(self) if self.template else None
        if conversation.tools and not conversation.calls_tools and not (setter and setter.knows_tools):
            counts[f"{UNUSED}tools"] += 1
            conversation = Conversation(conversation.turns, conversation.family)
        if setter is None and conversation.calls_tools:
            raise RowError("tools are called, and ChatML has no place for calls")
        if setter is not None:
            if conversation.calls_tools and not setter.knows_tools:
                raise RowError("tools are called, and the chat template has no place for calls")
            try:
                setter.arrange(open_with(self.system_prompt, conversation.turns), conversation.tools)
            except TemplateRefusal as refusal:
                raise RowError(f"chat template: {refusal}") from None
        return conversation


@lru_cache(maxsize=4)
def open_setter(wording: Wording) -> Typesetter:
    """The template of a wording, proven before a row is tried; a process holds the last ones.

    Raises:
        ModelError: nothing can be learned in it.
    """
    setter = open_typesetter(Path(wording.folder), wording.template, wording.thinking)
    setter.prove()
    return setter


def drop_thoughts(conversation: Conversation, counts: Counter[str]) -> Conversation:
    """The conversation without the thoughts that its replies begin with.

    Raises:
        RowError: a reply is a thought alone.
    """
    turns = [drop_thought(turn) for turn in conversation.turns]
    if turns == conversation.turns:
        return conversation
    if not all(turn.text or turn.calls for turn in turns):
        raise RowError("a reply is a thought alone")
    counts["thoughts dropped"] += 1
    return Conversation(turns, conversation.family, conversation.tools)
