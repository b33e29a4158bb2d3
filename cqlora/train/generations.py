"""What the model in training says to a few bundled prompts: the likeliest token each time, by its own forward pass.

No keys and values are kept: each new token costs a pass over all that stands before it, for a few short replies less
than what held-out text costs. In return whatever trains can reply: every layout, attention and quantisation.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cqlora.base import Base
from cqlora.config.choices import LANGUAGES
from cqlora.config.schema import StageConfig
from cqlora.data.chat import ChatEncoder
from cqlora.data.records import Turn
from cqlora.data.store import Pack
from cqlora.data.tokenizer import PlainTokenizer
from cqlora.evaluation.generations import Prompt, describe_reply, find_spelling, read_prompts
from cqlora.model.batch import build_batch
from cqlora.model.objective import Objective
from cqlora.train.distributed import Worker

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Reply:
    """A prompt, and what the model has said to it so far."""

    prompt: Prompt
    given: list[int]
    """Ids of the prompt."""
    said: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Questions:
    """The prompts of a run, as its stage puts them, and how long a reply may become."""

    prompts: list[tuple[Prompt, list[int]]]
    """With their ids."""
    as_chat: bool
    most_tokens: int
    end_ids: frozenset[int]
    spell: Callable[[Iterable[int]], str]

    def ask(self, objective: Objective, worker: Worker) -> list[dict[str, Any]]:
        """A line for each reply; every worker generates all of them, rank 0's tokens."""
        started = time.perf_counter()
        replies = [Reply(prompt, ids) for prompt, ids in self.prompts]
        was_training = objective.training
        objective.eval()
        for _ in range(self.most_tokens):
            if not (going_on := [reply for reply in replies if not reply.ended]):
                break
            # Workers that came to other tokens would soon wait for one another.
            for reply, token in zip(
                going_on, worker.broadcast(choose(objective, going_on, worker.device)), strict=True
            ):
                reply.said.append(token)
                reply.ended = token in self.end_ids
        objective.train(was_training)
        if worker.is_main:
            logger.info("%d replies took %.1f s", len(replies), time.perf_counter() - started)
        return [self.describe(reply) for reply in replies]

    def describe(self, reply: Reply) -> dict[str, Any]:
        """A finished reply as evaluation.json has it, without the token that ended it."""
        said = reply.said[:-1] if reply.ended else reply.said
        return describe_reply(reply.prompt, self.as_chat, self.spell(said), len(reply.said), ended=reply.ended)


@torch.no_grad()
def choose(objective: Objective, replies: list[Reply], device: torch.device) -> list[int]:
    """The likeliest next token of each reply."""
    # What stands in the place of the next token is not looked at by what comes before.
    documents = [[*reply.given, *reply.said, 0] for reply in replies]
    lengths = [len(ids) for ids in documents]
    token_ids = np.array([token for ids in documents for token in ids])
    label_mask = np.zeros(len(token_ids), dtype=bool)
    label_mask[np.cumsum(lengths) - 1] = True
    nothing = [0] * len(documents)
    pack = Pack(token_ids, label_mask, lengths, source_ids=nothing, characters=nothing, bytes=nothing)
    chosen: list[int] = objective.likeliest(build_batch([pack], device)).tolist()
    return chosen


def encode_questions(base: Base, stage: StageConfig) -> Questions | None:
    """The first bundled prompts of each language: questions in a conversation for sft, else openings of a text."""
    if not stage.eval_generations:
        return None
    tokenizer, as_chat = PlainTokenizer(base.path), stage.name == "sft"
    known = read_prompts()
    chosen = [
        prompt
        for language in LANGUAGES
        for prompt in [each for each in known if each.language == language][: stage.eval_generations]
    ]
    system_prompt = getattr(stage, "system_prompt", "")

    def encode(prompt: Prompt) -> list[int]:
        if not as_chat:
            opening = tokenizer.text.encode(prompt.opening, add_special_tokens=False).ids
            return [tokenizer.special.document_start, *opening]
        system = [Turn("system", system_prompt)] if system_prompt else []
        return ChatEncoder(tokenizer).encode_prompt([*system, Turn("user", prompt.question)])

    prompts = [(prompt, encode(prompt)) for prompt in chosen]
    most = stage.eval_generation_tokens
    return Questions(prompts, as_chat, most, tokenizer.end_ids, find_spelling(base.path))
