"""The ChatML template: conversations to token ids, with a mask of what the assistant said."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Encoding

from cqlora.data.records import Turn
from cqlora.data.tokenizer import TURN_END, TURN_START, PlainTokenizer, token_characters
from cqlora.errors import ModelError

TEMPLATE_VERSION = 1

CHAT_TEMPLATE = (
    "{%- if bos_token and bos_token != '<|im_start|>' -%}{{ bos_token }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set body = message['content'] if 'content' in message else message['text'] -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + body | trim + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""The template in Jinja, for `tokenizer_config.json` and the engine. `bos_token` comes first where the
tokenizer has one of its own, since the base has never seen a text without it."""

_DEFAULT_SYSTEM = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\n' + PROMPT | trim + '<|im_end|>\n' }}"
    "{%- endif -%}"
)


def chat_template(system_prompt: str) -> str:
    """CHAT_TEMPLATE, in which conversations without a system message get `system_prompt`, as in training with it."""
    if not system_prompt.strip():
        return CHAT_TEMPLATE
    # JSON's escapes are among those of Jinja's strings; characters beyond ASCII stay as they are.
    default = _DEFAULT_SYSTEM.replace("PROMPT", json.dumps(system_prompt, ensure_ascii=False))
    return CHAT_TEMPLATE.replace("{%- for message in messages -%}", default + "{%- for message in messages -%}")


@dataclass(slots=True)
class EncodedTurn:
    """A turn's tokens, from `<|im_start|>` to the newline after `<|im_end|>`."""

    turn: Turn
    ids: list[int]
    labels: bytes
    """1 where the token is the assistant's: its words and its `<|im_end|>`."""
    characters: int
    """Of the text under `labels`."""
    utf8_bytes: int


def render_turns(turns: Iterable[Turn]) -> str:
    """The conversation as template text, without a beginning-of-text token."""
    return "".join(f"{TURN_START}{turn.role}\n{turn.text.strip()}{TURN_END}\n" for turn in turns)


class ChatEncoder:
    """Encodes turns as the template's text would be, except that control tokens in a message stay text.

    Raises:
        ModelError: the tokenizer lacks the template's control tokens.
    """

    def __init__(self, tokenizer: PlainTokenizer) -> None:
        start, end = tokenizer.special.turn_start, tokenizer.special.turn_end
        if start is None or end is None:
            missing = TURN_START if start is None else TURN_END
            raise ModelError(
                f"the base's tokenizer has no {missing}, so it cannot hold conversations; add the "
                "chat tokens with `cqlora extend base=FOLDER output_dir=FOLDER vocab=none`."
            )
        self.start, self.end = start, end
        self.tokenizer = tokenizer
        self.segment = tokenizer.segment
        self.bos = [] if tokenizer.special.bos is None else [tokenizer.special.bos]
        self.newline = self.segment.encode("\n", add_special_tokens=False).ids
        self.header = self.segment.encode("assistant\n", add_special_tokens=False).ids

    def encode_turns(self, turns: Sequence[Turn], every_token: bool = False) -> list[EncodedTurn]:
        """The turns of any number of conversations, in order; `every_token` makes all of them labels."""
        texts = [f"{turn.role}\n{turn.text.strip()}" for turn in turns]
        encoded = self.tokenizer.encode_segments(texts)
        return [
            self.label_turn(turn, text, words, every_token)
            for turn, text, words in zip(turns, texts, encoded, strict=True)
        ]

    def label_turn(self, turn: Turn, text: str, words: list[int], every_token: bool) -> EncodedTurn:
        """Put control tokens around the words and mark what is trained."""
        ids = [self.start, *words, self.end, *self.newline]
        if every_token:
            return EncodedTurn(turn, ids, b"\1" * len(ids), len(text), len(text.encode()))
        if turn.role != "assistant":
            return EncodedTurn(turn, ids, bytes(len(ids)), 0, 0)
        header, said = self.split_header(text, words)
        labels = bytes(1 + header) + b"\1" * (len(words) - header + 1) + bytes(len(self.newline))
        return EncodedTurn(turn, ids, labels, len(said), len(said.encode()))

    def split_header(self, text: str, words: list[int]) -> tuple[int, str]:
        """How many tokens belong to `assistant` and its newline, and the text of the tokens after them."""
        if words[: len(self.header)] == self.header:
            return len(self.header), text[len("assistant\n") :]
        # The newline shares a token with the first words: that token is not the assistant's alone.
        encoding = self.segment.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        header = next((i for i, start in enumerate(starts) if start >= len("assistant\n")), len(starts))
        return header, text[starts[header] :] if header < len(starts) else ""

    def count_characters(self, encoded: EncodedTurn) -> tuple[list[int], list[int]]:
        """Characters and UTF-8 bytes that each token of a turn brings; control tokens bring none."""
        text = f"{encoded.turn.role}\n{encoded.turn.text.strip()}"
        encoding: Encoding = self.segment.encode(text, add_special_tokens=False)
        characters, utf8_bytes = token_characters(encoding, text)
        tail = [0] * (1 + len(self.newline))
        return [0, *characters.tolist(), *tail], [0, *utf8_bytes.tolist(), *tail]

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation up to where the assistant's next reply begins."""
        ids = list(self.bos)
        for encoded in self.encode_turns(turns):
            ids += encoded.ids
        return [*ids, self.start, *self.header]
