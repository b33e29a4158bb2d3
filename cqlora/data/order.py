"""Which packs make up each optimizer step: a pure function of seed and step, so that resuming needs no state."""

import math
from dataclasses import dataclass
from decimal import Decimal

import numpy as np


@dataclass(frozen=True, slots=True)
class StepOrder:
    """The order of a run's packs.

    Every epoch visits each pack once, in an order of its own; its last step takes what is left, so that no
    epoch leaks into the next.
    """

    packs: int
    """Packs of the training split."""
    global_batch_size: int
    """Packs of a step."""
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the packs."""
        return math.ceil(self.packs / self.global_batch_size)

    def count_steps(self, epochs: float) -> int:
        """Optimizer steps of `epochs` passes, a partial one rounded up to whole steps."""
        # As the decimal that was typed: in binary 1.1 is a little more than 1.1, and would be rounded up a step.
        return math.ceil(Decimal(str(epochs)) * self.steps_per_epoch)

    def packs_of_step(self, step: int) -> list[int]:
        """Packs of the step with this number, counted from 0, over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.packs)
        first = position * self.global_batch_size
        return [int(pack) for pack in order[first : first + self.global_batch_size]]


def share_among_ranks(packs: list[int], rank: int, world_size: int, micro_batch_size: int) -> list[list[int]]:
    """This rank's micro batches of a step: as many on every rank, since collectives wait for all of them.

    A rank that runs out in an uneven step gets empty micro batches at its end.
    """
    passes = math.ceil(len(packs) / (world_size * micro_batch_size))
    own = packs[rank::world_size]
    return [own[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(passes)]
