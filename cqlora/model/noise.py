"""NEFTune (2310.05914): noise on the input embeddings of a training step."""

from dataclasses import dataclass

import numpy as np
import torch

from cqlora.model.transfer import send


@dataclass(frozen=True, slots=True)
class EmbeddingNoise:
    """The noise of one micro batch: a function of its seed alone, so that a resumed run repeats it."""

    alpha: float
    seed: tuple[int, ...]
    """The run's seed, the step, the rank and the micro batch."""

    def add_to(self, embeddings: torch.Tensor, document_lengths: list[int]) -> torch.Tensor:
        """`embeddings` (1, T, d) and on top what is uniform in ±alpha/√(L·d), L the length of each token's document.

        The paper's algorithm 1 has L for the length of a sequence, and its code counts tokens without padding: a
        document's tokens in a pack. So every document's noise has the norm that it would have alone, about alpha/√3.
        """
        word = int(np.random.SeedSequence(self.seed).generate_state(1, np.uint64)[0])
        generator = torch.Generator(embeddings.device).manual_seed(word >> 1)
        noise = torch.empty_like(embeddings, requires_grad=False).uniform_(-1, 1, generator=generator)
        lengths = torch.tensor(document_lengths)
        magnitude = (self.alpha / torch.sqrt(lengths * embeddings.shape[-1])).repeat_interleave(
            lengths, output_size=embeddings.shape[1]
        )
        return embeddings + noise * send(magnitude[:, None].to(noise.dtype), noise.device)
