"""How well a model predicts held-out packs: token losses summed, then given per token, character and byte."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cqlora.model.batch import PackOfDocuments, build_batch


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out loss of one source."""

    summed_loss: float
    """Sum of the token losses."""
    tokens: int
    """Label tokens."""
    characters: int
    """Characters of the text that those tokens spell."""
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token; comparable only under one tokenizer."""
        return self.summed_loss / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the loss, infinite beyond what a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_character(self) -> float:
        """Bits to spell one character; comparable across vocabularies."""
        return self.summed_loss / math.log(2) / self.characters

    @property
    def bits_per_byte(self) -> float:
        """Bits to spell one byte of UTF-8; comparable across vocabularies and languages."""
        return self.summed_loss / math.log(2) / self.bytes


@torch.no_grad()
def sum_losses(objective: nn.Module, micro_batches: Iterable[Sequence[PackOfDocuments]], device: torch.device) -> float:
    """Sum of the token losses, in nats, over micro batches.

    Accumulated in float64, so that the sum does not depend on how many batches came before.
    """
    was_training = objective.training
    objective.eval()
    summed_loss = 0.0
    for packs in micro_batches:
        _, token_losses = objective(build_batch(packs, device), 1.0)
        summed_loss += float(token_losses.double().sum())
    objective.train(was_training)
    return summed_loss
