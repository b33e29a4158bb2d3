"""Conversations to token ids by a Jinja template, with a mask of what the assistant has to write."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from cqlora.config.choices import Thinking
from cqlora.data.layout import Control, Layout, Segment, Typesetter, fill
from cqlora.data.records import Turn
from cqlora.data.template import ChatTemplate, TemplateRefusal
from cqlora.data.tokenizer import PlainTokenizer, read_controls, read_special_names, token_characters
from cqlora.data.turn_forms import drop_thought
from cqlora.errors import DataError, ModelError

_TOKENS = ("bos", "eos", "pad", "unk")
_PROBE = [Turn("user", "你好 a?"), Turn("assistant", "好 b."), Turn("user", "c"), Turn("assistant", "d")]


class EncodedPart(NamedTuple):
    """A control token, or what stands between two."""

    text: str
    """Empty for a control token."""
    ids: list[int]
    context: int
    """Tokens at its beginning that are no labels."""
    trained: str
    """The text of the others."""


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """A conversation's parts, all of them or those up to a length."""

    parts: list[EncodedPart]
    reply_ends: list[int]
    """Tokens up to the end of each reply."""

    @property
    def ids(self) -> list[int]:
        """Its tokens."""
        return [token for part in self.parts for token in part.ids]

    @property
    def labels(self) -> bytes:
        """1 where the token is the assistant's; a chunk's first token never is."""
        return b"".join(bytes(part.context) + b"\1" * (len(part.ids) - part.context) for part in self.parts)

    @property
    def characters(self) -> int:
        """Of the text under `labels`."""
        return sum(len(part.trained) for part in self.parts)

    @property
    def utf8_bytes(self) -> int:
        """Of the text under `labels`."""
        return sum(len(part.trained.encode()) for part in self.parts)

    def __len__(self) -> int:
        return sum(len(part.ids) for part in self.parts)


def open_typesetter(folder: Path, source: str, thinking: Thinking = Thinking.train) -> Typesetter:
    """A template with the special tokens of the tokenizer in a folder.

    Raises:
        ModelError: the template is no Jinja, or the tokenizer is damaged.
    """
    special = read_special_names(folder)
    names = {f"{kind}_token": special[kind] for kind in _TOKENS if kind in special}
    return Typesetter(ChatTemplate(source), names, read_controls(folder), thinking is not Thinking.train)


class TemplateEncoder:
    """Encodes conversations as a template's text would be, except that control tokens in a message stay text.

    Raises:
        ModelError: nothing can be learned in the template, or its text does not give the tokens that it writes.
    """

    def __init__(
        self, tokenizer: PlainTokenizer, folder: Path, source: str, thinking: Thinking = Thinking.train
    ) -> None:
        self.tokenizer = tokenizer
        self.thinking = thinking
        self.typesetter = open_typesetter(folder, source, thinking)
        self.typesetter.prove()
        self.end = self.control_id(self.typesetter.end)
        """The token that ends a reply."""
        layout, texts = self.typesetter.arrange(_PROBE)
        (probe,) = self.encode([(layout, texts)])
        if probe.ids != tokenizer.encode_rendered(layout.fill(texts)):
            raise ModelError(
                f"the chat template puts space around control tokens that the tokenizer in {folder} takes away; choose "
                "stage.template=NAME."
            )

    def control_id(self, token: str) -> int:
        """The id of a control token."""
        found = self.tokenizer.text.token_to_id(token)
        assert found is not None, "controls are read from the same tokenizer"
        return found

    def encode(self, arranged: Sequence[tuple[Layout, list[str]]]) -> list[EncodedConversation]:
        """Conversations as Typesetter.arrange gives them."""
        filled = [
            [(fill(part.context, texts), fill(part.trained, texts)) if isinstance(part, Segment) else part
             for part in layout.parts]
            for layout, texts in arranged
        ]  # fmt: skip
        segments = [part for parts in filled for part in parts if not isinstance(part, Control)]
        # What comes before a reply's words is encoded by itself too, to see which tokens are theirs.
        wanted = dict.fromkeys(context + trained for context, trained in segments)
        wanted |= dict.fromkeys(context for context, trained in segments if context and trained)
        ids = dict(zip(wanted, self.tokenizer.encode_segments(list(wanted)), strict=True))
        conversations = []
        for (layout, _), parts in zip(arranged, filled, strict=True):
            encoded = [self.encode_part(part, ids) for part in parts]
            if parts and not isinstance(parts[0], Control):
                # Only what stands after a control token is encoded as such.
                encoded[0] = locate(self.tokenizer.text, *parts[0])
            ends = [sum(len(part.ids) for part in encoded[:end]) for end in layout.reply_ends]
            conversations.append(EncodedConversation(encoded, ends))
        return conversations

    def encode_part(self, part: Control | tuple[str, str], ids: dict[str, list[int]]) -> EncodedPart:
        """One part, of whose texts the ids are known."""
        if isinstance(part, Control):
            return EncodedPart("", [self.control_id(part.token)], int(not part.label), "")
        context, trained = part
        text = context + trained
        if not trained or not context:
            return EncodedPart(text, ids[text], 0 if trained else len(ids[text]), trained)
        if ids[text][: len(ids[context])] == ids[context]:
            return EncodedPart(text, ids[text], len(ids[context]), trained)
        return locate(self.tokenizer.segment, context, trained)

    def cut(self, conversation: EncodedConversation, length: int) -> EncodedConversation:
        """Its first `length` tokens."""
        kept, left = list[EncodedPart](), length
        for part in conversation.parts:
            if left <= 0:
                break
            tokenizer = self.tokenizer.segment if kept else self.tokenizer.text
            kept.append(part if len(part.ids) <= left else cut_part(tokenizer, part, left))
            left -= len(part.ids)
        return EncodedConversation(kept, [end for end in conversation.reply_ends if end <= length])

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation up to where the assistant's next reply begins.

        Raises:
            DataError: the template has no place for these turns.
        """
        switches = {}
        if self.thinking is Thinking.drop:
            turns = list(map(drop_thought, turns))
            switches = {"enable_thinking": False} if self.typesetter.skips_thought else {}
        plain = [turn._replace(text=turn.text.strip()) for turn in turns]
        try:
            arranged = self.typesetter.arrange_prompt(plain, **switches)
        except TemplateRefusal as refusal:
            raise DataError(f"the model's chat template takes no such messages: {refusal}.") from refusal
        (prompt,) = self.encode([arranged])
        return prompt.ids


def locate(tokenizer: Tokenizer, context: str, trained: str) -> EncodedPart:
    """A part by where its tokens begin: one that the context and the reply share is not the assistant's alone."""
    text = context + trained
    encoding = tokenizer.encode(text, add_special_tokens=False)
    starts = [start for start, _ in encoding.offsets]
    first = next((index for index, start in enumerate(starts) if start >= len(context)), len(starts))
    return EncodedPart(text, encoding.ids, first, text[starts[first] :] if first < len(starts) else "")


def cut_part(tokenizer: Tokenizer, part: EncodedPart, length: int) -> EncodedPart:
    """The first `length` tokens of a part, with the text that those of them bring that are labels."""
    encoding = tokenizer.encode(part.text, add_special_tokens=False)
    ends = token_characters(encoding, part.text)[0].cumsum().tolist()
    begin = ends[part.context - 1] if part.context else 0
    trained = part.text[begin : ends[length - 1]] if length > part.context else ""
    return EncodedPart(part.text[: ends[length - 1]], part.ids[:length], min(part.context, length), trained)
