"""Greedy replies to bundled prompts: in which language, how repetitive, how long, ended or cut."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cqlora.data.language import count_letters
from cqlora.errors import ModelError
from cqlora.inference.requests import Sampling
from cqlora.inference.text import ReplyText, TokenBytes

if TYPE_CHECKING:
    from cqlora.engine import LlamaEngine
    from cqlora.inference.batch import Reply

SLOTS = 8
"""Replies that are generated together."""
GRAM = 4
"""Characters of Chinese, words of English, whose repetition is counted."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to say, in two forms."""

    language: str
    question: str
    """For a model that knows conversations."""
    opening: str
    """For one that goes on with a text."""


def read_prompts() -> list[Prompt]:
    """20 prompts in Chinese and 10 in English, written for this project."""
    file = Path(__file__).parent / "bundled" / "prompts.json"
    return [Prompt(**each) for each in json.loads(file.read_text(encoding="utf-8"))]


def generate(engine: "LlamaEngine", as_chat: bool, max_new_tokens: int) -> Iterator[dict[str, Any]]:
    """A reply to each prompt, with what is measured of it, in the order of the prompts.

    Raises:
        ModelError: questions are to be asked of a model whose tokenizer has no turns.
    """
    if as_chat and not engine.knows_turns:
        raise ModelError(f"{engine.name} has no tokens for a conversation's turns; use prompt_form=text.")
    prompts = read_prompts()
    for first in range(0, len(prompts), SLOTS):
        together = prompts[first : first + SLOTS]
        for prompt, (text, reply) in zip(together, reply_to(engine, together, as_chat, max_new_tokens), strict=True):
            yield describe_reply(prompt, as_chat, text, reply.completion_tokens, reply.finish_reason == "stop")


def describe_reply(prompt: Prompt, as_chat: bool, text: str, tokens: int, ended: bool) -> dict[str, Any]:
    """A reply with what is measured of it."""
    return {
        "prompt": prompt.question if as_chat else prompt.opening,
        "language": prompt.language,
        "reply": text,
        "language_share": language_share(text, prompt.language),
        "repetition": repetition(text, prompt.language),
        "tokens": tokens,
        "ended": ended,
    }


def find_spelling(folder: Path) -> Callable[[Iterable[int]], str]:
    """What makes text of a reply's tokens as the engine does, by the tokenizer in `folder`.

    Control tokens, and at the end half a character, are left out.

    Raises:
        ModelError: the tokenizer is of a kind that the engine does not decode.
    """
    token_bytes = TokenBytes(folder)

    def spell(ids: Iterable[int]) -> str:
        text = ReplyText(token_bytes, stop=())
        return "".join([*map(text.add, ids), text.finish()])

    return spell


def reply_to(
    engine: "LlamaEngine", prompts: list[Prompt], as_chat: bool, max_new_tokens: int
) -> "list[tuple[str, Reply]]":
    """The text of each reply, and the reply itself."""
    batch = engine.open_batch(len(prompts))
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
    replies = []
    for prompt in prompts:
        asked = [{"role": "user", "text": prompt.question}]
        ids = engine.encode_messages(asked) if as_chat else engine.encode_text(prompt.opening)
        replies.append(batch.admit(ids, sampling))
    texts = {id(reply): "" for reply in replies}
    while batch.free_slots < len(replies):
        for reply, text in batch.step():
            if reply.failure:
                raise reply.failure
            texts[id(reply)] += text
    return [(texts[id(reply)], reply) for reply in replies]


def language_share(reply: str, language: str) -> float:
    """Share of the language's script among a reply's letters; 0 for a reply without letters."""
    letters = count_letters(reply)
    own = letters.han if language == "zh" else letters.latin
    return own / max(1, sum(letters))


def repetition(reply: str, language: str) -> float:
    """Share of a reply's 4-grams (characters of Chinese, words of English) that occurred before in it."""
    units = [each for each in reply if not each.isspace()] if language == "zh" else reply.lower().split()
    grams = list(zip(*(units[start:] for start in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
