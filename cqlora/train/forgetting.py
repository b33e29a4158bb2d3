"""What a run forgets: English held-out text and examples in context, against what they cost at its start."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cqlora.base import Base
from cqlora.data.tokenizer import PlainTokenizer
from cqlora.evaluation.probe import EXAMPLES, Pattern, encode, list_patterns, list_sequences
from cqlora.model.batch import build_batch
from cqlora.system.metrics import read_metrics

WATCHED = "translation"
"""The pattern of the probe that is measured during training, in both directions."""
FIRST, LAST = 1, 2
"""Places whose answers are compared."""


@dataclass(frozen=True, slots=True)
class ProbePattern:
    """A round of a pattern's sequences, laid end to end as a pack."""

    pattern: Pattern
    token_ids: np.ndarray
    """int64 (tokens,)."""
    places: np.ndarray
    """int8 (tokens,): FIRST or LAST under the answers of these places, else 0."""
    document_lengths: list[int]
    characters: int
    """Of the answers of a round, which are the same at each place."""

    @property
    def label_mask(self) -> np.ndarray:
        """bool (tokens,): what is predicted."""
        return self.places > 0

    @property
    def source_ids(self) -> list[int]:
        """The sequences are of no source."""
        return [0] * len(self.document_lengths)

    @torch.no_grad()
    def score(self, objective: nn.Module, device: torch.device) -> dict[str, Any]:
        """Nats per character of the last answers (`loss`), of the first, and what is gained between them."""
        was_training = objective.training
        objective.eval()
        batch = build_batch([self], device)
        _, losses = objective(batch, 1.0)
        objective.train(was_training)
        places = self.places[batch.label_positions.cpu().numpy()]
        nats = losses.double().cpu().numpy()
        first, last = (float(nats[places == place].sum()) / self.characters for place in (FIRST, LAST))
        return {
            "source": f"probe/{self.pattern.name}",
            "language": self.pattern.language,
            "loss": last,
            "first_loss": first,
            "gain": first - last,
        }


def encode_probe(base: Base, seed: int) -> list[ProbePattern]:
    """The patterns that are measured during training, as this base reads them."""
    tokenizer = PlainTokenizer(base.path)
    return [encode_round(tokenizer, pattern, seed) for pattern in list_patterns() if pattern.name == WATCHED]


def encode_round(tokenizer: PlainTokenizer, pattern: Pattern, seed: int) -> ProbePattern:
    """The first round of a pattern."""
    sequences = list(list_sequences(pattern, seed))[:EXAMPLES]
    ids: list[int] = []
    lengths, marks = [], []
    for examples in sequences:
        found, spans = encode(tokenizer, examples)
        places = np.zeros(len(found), dtype=np.int8)
        for place, (start, end) in ((FIRST, spans[0]), (LAST, spans[-1])):
            places[start:end] = place
        ids += found
        lengths.append(len(found))
        marks.append(places)
    characters = sum(len(example.answer) for example in sequences[0])
    return ProbePattern(pattern, np.array(ids), np.concatenate(marks), lengths, characters)


def read_start(folder: Path) -> list[dict[str, Any]]:
    """What a run measured before its first step."""
    return [row for row in read_metrics(folder) if row["step"] == 0 and row["kind"] in ("eval", "probe")]


def find_forgotten(start: list[dict[str, Any]], now: list[dict[str, Any]], most: float) -> Iterator[dict[str, Any]]:
    """Each English source, and each pattern of the probe, whose loss has risen by more than the share `most`."""
    before = {(row["source"], row["language"]): float(row["loss"]) for row in start}
    for row in now:
        first = before.get((row["source"], row["language"]))
        if not first or (row["kind"] == "eval" and row["language"] != "en"):
            continue
        rise = row["loss"] / first - 1
        if rise > most:
            told = {"source": row["source"], "language": row["language"]}
            yield told | {"start": first, "now": row["loss"], "rise": rise}
