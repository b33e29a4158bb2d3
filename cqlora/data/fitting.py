"""Conversations in a template of one's own to chunks: whole where they fit, else written anew in parts that do.

A template may write a turn otherwise in another place, so nothing is cut out of what it wrote: every part is a
conversation that it writes by itself, of whole exchanges. Only a reply too long ends early.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise

from cqlora.data.chunks import Chunks, EncodedBatch
from cqlora.data.records import Conversation, Turn
from cqlora.data.rendered import EncodedConversation, TemplateEncoder
from cqlora.data.shorten import CONTEXT_SHARE
from cqlora.data.template import TemplateRefusal
from cqlora.data.tokenizer import PlainTokenizer

_TRIES = 4
"""Times that a question is cut shorter: tokens of what is left of a text may be more than they were in it."""


class RenderedConversations:
    """Encodes conversations in one template for one length."""

    def __init__(
        self, tokenizer: PlainTokenizer, encoder: TemplateEncoder, sequence_length: int, system_prompt: str
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.sequence_length = sequence_length
        self.system_prompt = system_prompt

    def encode(self, records: Sequence[int], conversations: Sequence[Conversation]) -> EncodedBatch:
        """The chunks of conversations, which are the records of these numbers.

        Those that the template refuses have been rejected with their rows (`wording`).
        """
        chunks = Chunks()
        opened = [open_with(self.system_prompt, each.turns) for each in conversations]
        arranged = [
            self.encoder.typesetter.arrange_proven(turns, each.tools)
            for turns, each in zip(opened, conversations, strict=True)
        ]
        encoded = self.encoder.encode(arranged)
        for record, turns, each, whole in zip(records, opened, conversations, encoded, strict=True):
            for part in self.fit(turns, each.tools, whole, chunks.counts):
                # A first token has nothing before it and cannot be learned.
                chunks.add(record, part.ids, b"\0" + part.labels[1:], part.characters, part.utf8_bytes)
        return chunks.batch(self.tokenizer.dtype)

    def fit(
        self, turns: list[Turn], tools: str, whole: EncodedConversation, counts: Counter[str]
    ) -> list[EncodedConversation]:
        """A conversation in as few parts as fit, each with the system message."""
        if len(whole) <= self.sequence_length:
            return [whole]
        system = turns[:1] if turns[0].role == "system" else []
        groups = self.group_exchanges(turns[len(system) :], whole)
        if len(groups) > 1:
            counts["conversations cut between turns"] += 1
        fitted = []
        while groups:
            group = groups.pop(0)
            part = self.write([*system, *chain.from_iterable(group)], tools, counts)
            if part is not None and len(part) > self.sequence_length and len(group) > 1:
                # Alone they take more room than in their place.
                groups[:0] = [group[:-1], group[-1:]]
            elif part is not None:
                fitted.append(self.shorten(system, group[0], tools, part, counts) if len(group) == 1 else part)
        return [part for part in fitted if part is not None]

    def group_exchanges(self, turns: list[Turn], whole: EncodedConversation) -> list[list[list[Turn]]]:
        """Consecutive exchanges together as long as their tokens fit beside what the first one opens with."""
        exchanges = split_exchanges(turns)
        replies = [sum(turn.role == "assistant" for turn in exchange) for exchange in exchanges]
        ends = [0, *(whole.reply_ends[sum(replies[: n + 1]) - 1] for n in range(len(exchanges)))]
        groups: list[list[list[Turn]]] = []
        left = 0
        for exchange, (start, end) in zip(exchanges, pairwise(ends), strict=True):
            if not groups or end - start > left:
                groups.append([])
                left = self.sequence_length
            groups[-1].append(exchange)
            left -= end - start
        return groups

    def write(self, turns: list[Turn], tools: str, counts: Counter[str]) -> EncodedConversation | None:
        """Turns as a conversation of their own; None, counted, where the template does not take them so."""
        try:
            return self.encoder.encode([self.encoder.typesetter.arrange(turns, tools)])[0]
        except TemplateRefusal:
            counts["parts that the template does not take left out"] += 1
            return None

    def shorten(
        self, system: list[Turn], turns: list[Turn], tools: str, part: EncodedConversation, counts: Counter[str]
    ) -> EncodedConversation | None:
        """One exchange in the length: its question loses its beginning before its reply loses its end.

        As `shorten_exchange`, for ChatML, does: a quarter of the room is the context's, where it needs that.
        """
        whole, room = len(part), self.sequence_length
        if whole <= room:
            return part
        context = len(part.labels) - len(part.labels.lstrip(b"\0"))
        kept = min(context, max(room - (whole - context), room // CONTEXT_SHARE))
        if kept + whole - context > room:
            counts["replies cut at their end"] += 1
        if context > kept:
            shorter = self.shorten_question(system, turns, tools, kept, counts)
            if shorter is None and system:
                counts["system messages too long left out"] += 1
                shorter = self.shorten_question([], turns, tools, kept, counts)
            if shorter is None:
                counts["exchanges too long left out"] += 1
                return None
            part = shorter
        return self.encoder.cut(part, room)

    def shorten_question(
        self, system: list[Turn], turns: list[Turn], tools: str, room: int, counts: Counter[str]
    ) -> EncodedConversation | None:
        """The exchange with as much of the end of its last question as leaves at most `room` tokens before the reply.

        None where not a word of it fits.
        """
        last = next(number for number, turn in enumerate(turns) if turn.role == "assistant") - 1
        if last < 0:
            return None
        question = turns[last].text
        for _ in range(_TRIES):
            part = self.write([*system, turns[last]._replace(text=question), *turns[last + 1 :]], tools, counts)
            if part is None:
                return None
            excess = len(part.labels) - len(part.labels.lstrip(b"\0")) - room
            if excess <= 0:
                if question != turns[last].text or last > 0:
                    counts["questions cut at their beginning"] += 1
                return part
            offsets = self.tokenizer.segment.encode(question, add_special_tokens=False).offsets
            # A character of several tokens goes whole.
            begin = next((start for start, _ in offsets[excess:] if start), None)
            if begin is None:
                return None
            question = question[begin:].lstrip()
        return None


def open_with(system_prompt: str, turns: list[Turn]) -> list[Turn]:
    """A conversation's turns, the stage's system prompt first where it brings none."""
    if system_prompt and turns[0].role != "system":
        return [Turn("system", system_prompt), *turns]
    return turns


def split_exchanges(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Turns grouped so that each group but the first begins where a user speaks after an assistant."""
    groups: list[list[Turn]] = []
    for turn in turns:
        if not groups or (turn.role not in ("assistant", "tool") and groups[-1][-1].role == "assistant"):
            groups.append([])
        groups[-1].append(turn)
    return groups
