"""The forward pass for generation: ragged batches in one pass, keys and values kept per reply.

The arithmetic is that of transformers' LlamaForCausalLM, with what other kinds add to it: biases, norms of heads,
layers without rotary embedding. Queries, keys and values are one matrix, as are the
gate and the up projection, since a processor spends a token's time in reading matrices and calling operators.
On a processor everything between two matrices is float32 whatever the matrices are: small operators take a
fifth of bfloat16's time there, stay on one thread, and lose nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from cqlora.inference.architecture import Architecture, rotary_tables
from cqlora.inference.attention import Alone, Attention, Together
from cqlora.inference.cache import KeyValueCache, Shelf
from cqlora.inference.linear import Linear

STEADY_ROWS = 4
"""Libraries choose the kernel of a product by how many rows it has, and each kernel adds up in an order of its own:
where the number of rows is always this one, so is the kernel."""
_SCORED_ROWS = 256
"""Positions whose logits exist at once when tokens are scored."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one block."""

    attention_norm: torch.Tensor
    query_key_value: Linear
    """hidden to (heads + 2 · key_value_heads) · head_dim."""
    head_norms: torch.Tensor | None
    """(heads + key_value_heads, head_dim): weights of the norms of each head's queries and keys, if it has any."""
    attention_output: Linear
    feed_forward_norm: torch.Tensor
    gate_up: Linear
    """hidden to 2 · intermediate: the gate's outputs, then the up projection's."""
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model, on one device; norms are in the type of the activations."""

    embedding: torch.Tensor
    """(vocab_size, hidden)."""
    layers: list[Layer]
    norm: torch.Tensor
    head: Linear
    """hidden to vocab_size."""


@dataclass(frozen=True, slots=True)
class Segment:
    """New tokens of one sequence, which follow what its cache holds."""

    cache: KeyValueCache
    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Query:
    """A sequence, and the tokens whose probabilities after its last positions are asked for."""

    ids: Sequence[int]
    targets: Sequence[Sequence[int]]
    """Alternatives of k tokens each: the j-th of them is one that may follow the first len(ids) - k + j + 1 ids."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a query comes to."""

    log_probabilities: NDArray[np.float32]
    """(alternatives, k), natural logarithms."""
    likeliest: NDArray[np.int64]
    """(k,): the likeliest token at each position."""


class Decoder:
    """Runs segments of any number of sequences through the model at once."""

    def __init__(self, architecture: Architecture, weights: Weights) -> None:
        self.architecture = architecture
        self.weights = weights
        self.dtype, self.device = weights.norm.dtype, weights.norm.device
        self._epsilon = torch.tensor(architecture.epsilon, device=self.device)
        cosine, sine = rotary_tables(architecture.rope, architecture.head_dim, architecture.max_length)
        self._cosine = cosine.repeat(1, 2).to(self.device, self.dtype)
        self._sine = torch.cat([-sine, sine], dim=1).to(self.device, self.dtype)

    def new_cache(self) -> KeyValueCache:
        """An empty cache for one sequence."""
        return KeyValueCache(self.architecture, self.weights.norm)

    @torch.inference_mode()
    def next_logits(
        self, segments: Sequence[Segment], steady: bool = False, shelf: Shelf | None = None
    ) -> torch.Tensor:
        """float32 (segments, vocab_size): logits after the last token of each; the caches grow by the tokens.

        `steady` is for segments of one token: their logits are the same to the last bit whatever other segments
        there are, at the price of passes of STEADY_ROWS rows, some of them empty, and of attention one by one.
        Without it the caches on `shelf`, where one is given, are those of the first segments, of one token each.
        """
        if steady:
            starts = range(0, len(segments), STEADY_ROWS)
            return torch.cat([self._steady_logits(segments[n : n + STEADY_ROWS]) for n in starts])
        together = len(shelf.caches) if shelf else 0
        first = [Together(shelf)] if shelf and together else []
        hidden = self._run(segments, [*first, *_each(segments[together:])])
        ends = torch.tensor([len(segment.ids) for segment in segments], device=self.device).cumsum(0) - 1
        return self.weights.head(hidden[ends]).float().cpu()

    def _steady_logits(self, segments: Sequence[Segment]) -> torch.Tensor:
        """As next_logits, of at most STEADY_ROWS segments of one token, in a pass of exactly so many rows."""
        hidden = self._run(segments, _each(segments), STEADY_ROWS - len(segments))
        return self.weights.head(hidden)[: len(segments)].float().cpu()

    @torch.inference_mode()
    def all_logits(self, ids: Sequence[int]) -> torch.Tensor:
        """float32 (tokens, vocab_size): logits after every token of one sequence."""
        segments = [Segment(self.new_cache(), ids)]
        return self.weights.head(self._run(segments, _each(segments))).float()

    @torch.inference_mode()
    def score(self, queries: Sequence[Query]) -> list[Scores]:
        """The log-probabilities of given tokens, all queries in one pass."""
        segments = [Segment(self.new_cache(), query.ids) for query in queries]
        hidden = self._run(segments, _each(segments))
        ends = list(accumulate(len(query.ids) for query in queries))
        return [
            self._score_rows(hidden[end - len(query.targets[0]) : end], query)
            for query, end in zip(queries, ends, strict=True)
        ]

    def _score_rows(self, hidden: torch.Tensor, query: Query) -> Scores:
        """Scores of a query from its (k, hidden) last states, with the logits of a few of them at once."""
        targets = torch.tensor(query.targets, device=self.device)
        log_probabilities, likeliest = torch.empty(targets.shape), torch.empty(targets.shape[1], dtype=torch.int64)
        for first in range(0, len(hidden), _SCORED_ROWS):
            rows = slice(first, first + _SCORED_ROWS)
            logits = self.weights.head(hidden[rows]).float()
            likeliest[rows] = logits.argmax(dim=1).cpu()
            chosen = logits.gather(1, targets[:, rows].T) - logits.logsumexp(dim=1, keepdim=True)
            log_probabilities[:, rows] = chosen.T.cpu()
        return Scores(log_probabilities.numpy(), likeliest.numpy())

    def _run(self, segments: Sequence[Segment], attentions: Sequence[Attention], empty_rows: int = 0) -> torch.Tensor:
        """(tokens of all segments and empty rows, hidden): after the last norm."""
        starts = [segment.cache.length for segment in segments]
        tokens = [token for segment in segments for token in segment.ids]
        places = [start + n for start, segment in zip(starts, segments, strict=True) for n in range(len(segment.ids))]
        ids, positions = (torch.tensor(row + [0] * empty_rows, device=self.device) for row in (tokens, places))
        rotation = self._cosine[positions, None], self._sine[positions, None]
        hidden = F.embedding(ids, self.weights.embedding).to(self.dtype)
        for number, layer in enumerate(self.weights.layers):
            hidden = hidden + self._attend(number, layer, hidden, attentions, rotation)
            hidden = hidden + self._feed_forward(layer, hidden)
        for segment in segments:
            segment.cache.length += len(segment.ids)
        return self._normalise(hidden, self.weights.norm)

    def _attend(
        self,
        number: int,
        layer: Layer,
        hidden: torch.Tensor,
        attentions: Sequence[Attention],
        rotation: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        shape = self.architecture
        projected = layer.query_key_value(self._normalise(hidden, layer.attention_norm))
        projected = projected.view(len(hidden), -1, shape.head_dim)
        rotated = projected[:, : shape.heads + shape.key_value_heads]
        if layer.head_norms is not None:
            rotated.copy_(self._normalise(rotated, layer.head_norms))
        if number not in shape.unrotated:
            rotated.copy_(self._rotate(rotated, *rotation))
        queries = projected[:, : shape.heads]
        kept = projected[:, shape.heads :].view(len(hidden), 2, shape.key_value_heads, shape.head_dim)
        attended, first = [], 0
        for attention in attentions:
            last = first + attention.tokens
            attended.append(attention(number, queries[first:last], kept[first:last]))
            first = last
        if first < len(hidden):
            attended.append(hidden.new_zeros(len(hidden) - first, shape.heads * shape.head_dim))
        return layer.attention_output(torch.cat(attended) if len(attended) > 1 else attended[0])

    def _feed_forward(self, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = layer.gate_up(self._normalise(hidden, layer.feed_forward_norm)).chunk(2, dim=1)
        return layer.down(F.silu(gate) * up)

    def _normalise(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm in five operators, of which the stock one has nine."""
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, norm, norm, value=1 / hidden.shape[-1]).rsqrt_()
        return (hidden * weight).mul_(scale)

    def _rotate(self, heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """Rotate halves of (tokens, heads, head_dim) by their positions' angles."""
        return heads * cosine + heads.roll(self.architecture.head_dim // 2, dims=-1) * sine


def _each(segments: Sequence[Segment]) -> list[Attention]:
    """Attention one by one, with room in every cache."""
    for segment in segments:
        segment.cache.reserve(segment.cache.length + len(segment.ids))
    return [Alone(segment.cache, len(segment.ids)) for segment in segments]
