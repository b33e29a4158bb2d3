"""The in-context probe: how much less the last example of a repeated pattern costs a model than the first.

Continued pretraining may gain bits per character and lose this early and for good (2506.00288). Every pattern is
given in rounds of examples, each of which stands at each place once, so that the first and the last place are
compared on the same answers.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cqlora.errors import ModelError
from cqlora.evaluation.statistics import mean
from cqlora.evaluation.text import score_sequences

if TYPE_CHECKING:
    from cqlora.engine import LlamaEngine

EXAMPLES = 8
"""Of a pattern, one after the other."""
ROUNDS = 2
"""Of EXAMPLES sequences each, with other examples."""
COPIED = 6
"""Characters or words that a copying example repeats."""


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a pattern."""

    context: str
    answer: str
    """What is predicted, its line's end included."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A task that a model may pick up from its examples."""

    name: str
    language: str
    """Of the answers."""
    examples: list[Example]


@cache
def read_material() -> dict[str, Any]:
    """Sentences and words, written for this project."""
    file = Path(__file__).parent / "bundled" / "probe.json"
    material: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return material


@cache
def list_patterns() -> list[Pattern]:
    """Translation, classification and copying, each with answers in Chinese and in English."""
    material = read_material()
    pairs, classes = material["translations"], material["classes"]
    return [
        Pattern("translation", "en", [Example(f"中文：{zh}\n英文：", f"{en}\n") for zh, en in pairs]),
        Pattern("translation", "zh", [Example(f"英文：{en}\n中文：", f"{zh}\n") for zh, en in pairs]),
        Pattern(
            "classification",
            "zh",
            [Example(f"词语：{zh}\n类别：", f"{classes[kind][0]}\n") for zh, _, kind in material["words"]],
        ),
        Pattern(
            "classification",
            "en",
            [Example(f"Word: {en}\nKind:", f" {classes[kind][1]}\n") for _, en, kind in material["words"]],
        ),
        Pattern(
            "copying",
            "zh",
            [Example(f"原文：{text}\n抄写：", f"{text}\n") for text in draw_texts(list(material["copied"]["zh"]), "")],
        ),
        Pattern(
            "copying",
            "en",
            [
                Example(f"Text: {text}\nCopy:", f" {text}\n")
                for text in draw_texts(material["copied"]["en"].split(), " ")
            ],
        ),
    ]


def draw_texts(words: list[str], joint: str) -> list[str]:
    """A text of COPIED words that mean nothing together, for every example there may be."""
    chooser = random.Random("copying")
    return [joint.join(chooser.sample(words, COPIED)) for _ in range(EXAMPLES * ROUNDS)]


def list_sequences(pattern: Pattern, seed: int) -> Iterator[list[Example]]:
    """The sequences of a pattern: in each of the ROUNDS the same EXAMPLES, turned by one place each time."""
    chosen = random.Random(f"{pattern.name} {pattern.language} {seed}").sample(pattern.examples, EXAMPLES * ROUNDS)
    for first in range(0, len(chosen), EXAMPLES):
        examples = chosen[first : first + EXAMPLES]
        for turn in range(EXAMPLES):
            yield examples[turn:] + examples[:turn]


def probe(engine: "LlamaEngine", pattern: Pattern, seed: int, batch_tokens: int) -> dict[str, Any]:
    """Nats per character of the answers at each place, and the gain from the first to the last.

    Characters and not tokens, so that vocabularies can be compared.

    Raises:
        ModelError: the examples do not fit in the model's positions.
    """
    sequences = list(list_sequences(pattern, seed))
    encoded = [encode(engine, examples) for examples in sequences]
    longest = max(len(ids) for ids, _ in encoded)
    if longest > engine.max_length:
        raise ModelError(
            f"{engine.name} holds {engine.max_length} positions and the probe's examples take {longest}; leave "
            "the probe out with parts=[text,generations]."
        )
    scored = score_sequences(engine, [ids for ids, _ in encoded], batch_tokens)
    losses = [
        answer_losses(found, spans, examples)
        for found, (_, spans), examples in zip(scored, encoded, sequences, strict=True)
    ]
    return describe(pattern, np.array(losses))


def answer_losses(
    log_probabilities: np.ndarray, spans: list[tuple[int, int]], examples: Sequence[Example]
) -> list[float]:
    """Nats per character of each answer of a sequence; `log_probabilities` lacks the sequence's first token."""
    return [
        -float(log_probabilities[start - 1 : end - 1].sum(dtype=np.float64)) / len(example.answer)
        for (start, end), example in zip(spans, examples, strict=True)
    ]


class EncodesParts(Protocol):
    """A tokenizer, or an engine with one."""

    def encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """Ids of the parts of one document, each encoded by itself."""


def encode(tokenizer: EncodesParts, examples: Sequence[Example]) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of a sequence and where each answer's lie.

    Contexts and answers are encoded apart, so that no token is part of both, whatever the vocabulary.
    """
    parts = tokenizer.encode_parts([part for example in examples for part in (example.context, example.answer)])
    ids: list[int] = []
    spans = []
    for number, part in enumerate(parts):
        if number % 2:
            spans.append((len(ids), len(ids) + len(part)))
        ids += part
    return ids, spans


def describe(pattern: Pattern, losses: np.ndarray) -> dict[str, Any]:
    """A pattern's line of the record, from losses (sequences, EXAMPLES)."""
    by_place = losses.mean(axis=0)
    gain = mean(pair_places(losses))
    return {
        "pattern": pattern.name,
        "language": pattern.language,
        "losses": by_place.tolist(),
        "first_loss": float(by_place[0]),
        "last_loss": float(by_place[-1]),
        "gain": gain.value,
        "gain_error": gain.error,
    }


def pair_places(losses: np.ndarray) -> np.ndarray:
    """(sequences,): by how much each example is cheaper at the last place than at the first."""
    # Turned by one, the example that was first in a sequence is last in the next one of its round.
    rounds = losses.reshape(-1, EXAMPLES, EXAMPLES)
    gains: np.ndarray = (rounds[:, :, 0] - np.roll(rounds[:, :, -1], -1, axis=1)).ravel()
    return gains
