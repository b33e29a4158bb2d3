"""The next token of one reply from its logits."""

import torch

from cqlora.errors import ModelError
from cqlora.inference.requests import Sampling

_FIRST_CANDIDATES = 256
_LEAST, _MOST = 1e-4, 1e4
"""Temperatures and penalties that float32 divides by without losing anything; others are computed with in float64."""
_LARGEST = 1e300


class TokenChooser:
    """Chooses tokens for one reply; its random numbers are its own, so no other reply changes them."""

    def __init__(self, sampling: Sampling, prompt_ids: list[int], vocab_size: int) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        divisors = (sampling.temperature or 1.0, sampling.repetition_penalty)
        self._is_extreme = not all(_LEAST <= divisor <= _MOST for divisor in divisors)
        self._seen: torch.Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[torch.tensor(prompt_ids)] = True

    def choose(self, logits: torch.Tensor) -> int:
        """A token from float32 (vocab_size,): penalty, temperature, top-k, top-p, in transformers' order.

        Raises:
            ModelError: there is no likeliest token, since a logit is infinite or no number.
        """
        if not torch.isfinite(logits.max()):
            raise ModelError("the model's logits are not finite; its weights are damaged, or need dtype=float32.")
        if self._is_extreme:
            logits = logits.double()
        if self._seen is not None:
            penalty = self._sampling.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, penalised, logits)
        token = int(logits.argmax()) if self._sampling.temperature == 0 else self._sample(logits)
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _sample(self, logits: torch.Tensor) -> int:
        if self._is_extreme:
            logits = logits.clamp(-_LARGEST, _LARGEST)
        scaled = (logits - logits.max()) / self._sampling.temperature
        probabilities, tokens = self._candidates(torch.softmax(scaled, dim=-1))
        # One uniform number against the running sum: what is drawn depends on this reply's numbers alone.
        sums = probabilities.double().cumsum(0)
        drawn = torch.rand((), dtype=torch.float64, generator=self._generator) * sums[-1]
        place = min(int(torch.searchsorted(sums, drawn, right=True)), len(tokens) - 1)
        return int(tokens[place])

    def _candidates(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities and ids that top-k and top-p leave, the likeliest first."""
        size = len(probabilities)
        count = min(self._sampling.top_k or size, size)
        # A full sort of the vocabulary costs more than a small model's layer; the likeliest few nearly always do.
        first = min(count, _FIRST_CANDIDATES)
        likeliest, tokens = probabilities.topk(first)
        total = 1.0 if count == size else float(probabilities.topk(count).values.sum())
        if first < count and float(likeliest.sum()) < self._sampling.top_p * total:
            likeliest, tokens = probabilities.topk(count)
        if self._sampling.top_p < 1.0:
            # A token stays when those before it have not reached top_p yet.
            before = likeliest.cumsum(0) - likeliest
            kept = max(1, int((before < self._sampling.top_p * total).sum()))
            likeliest, tokens = likeliest[:kept], tokens[:kept]
        return likeliest, tokens
