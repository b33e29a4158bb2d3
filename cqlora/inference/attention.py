"""How new tokens attend to the keys that a sequence holds: one sequence, or the short ones of a batch at once."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F

from cqlora.inference.cache import KeyValueCache, Shelf


class Attention(Protocol):
    """Attention of the tokens of one step, layer after layer; made before the step, where the lengths are known."""

    tokens: int

    def __call__(self, layer: int, queries: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """(tokens, heads · head_dim) of queries (tokens, heads, head_dim).

        `kept`, the new keys and values, (tokens, 2, key_value_heads, head_dim), goes into the cache first.
        """


class Alone:
    """New tokens of one sequence."""

    def __init__(self, cache: KeyValueCache, tokens: int) -> None:
        self.tokens = tokens
        end = cache.length + tokens
        # A view costs as much as a small product: those of all layers are made in one call.
        self._places = cache.store[:, :, :, cache.length : end].unbind()
        self._keys = cache.store[:, 0, :, :end].unbind()
        self._values = cache.store[:, 1, :, :end].unbind()

    def __call__(self, layer: int, queries: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        self._places[layer].copy_(kept.permute(1, 2, 0, 3))
        return attend(queries, self._keys[layer], self._values[layer])


class Together:
    """One new token of each sequence on a shelf, in the order of its rows."""

    def __init__(self, shelf: Shelf) -> None:
        self.tokens = len(shelf.caches)
        device = shelf.store.device
        lengths = torch.tensor([cache.length for cache in shelf.caches], device=device)
        longest = max(cache.length for cache in shelf.caches) + 1
        _, pair, rows, heads, positions, head_dim = shelf.store.shape
        starts = torch.arange(pair * rows * heads, device=device).view(pair, rows, heads)[:, : self.tokens] * positions
        self._places = (starts + lengths[:, None]).transpose(0, 1).flatten()
        self._stores = shelf.store.view(-1, pair * rows * heads * positions, head_dim).unbind()
        held = shelf.store[:, :, : self.tokens].flatten(2, 3)[:, :, :, :longest]
        self._keys, self._values = held[:, 0].transpose(2, 3).unbind(), held[:, 1].unbind()
        hidden = torch.arange(longest, device=device) > lengths[:, None]
        mask = shelf.store.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)
        self._mask = mask.repeat_interleave(heads, dim=0)[:, None]

    def __call__(self, layer: int, queries: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        head_dim = queries.shape[2]
        self._stores[layer].index_copy_(0, self._places, kept.reshape(-1, head_dim))
        grouped = queries.reshape(len(self._mask), -1, head_dim)
        scores = torch.baddbmm(self._mask, grouped, self._keys[layer], alpha=head_dim**-0.5)
        return torch.bmm(scores.softmax(dim=-1), self._values[layer]).view(self.tokens, -1)


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(tokens, heads · head_dim): new tokens attend to all before them and to themselves.

    `queries` is (tokens, heads, head_dim); `keys` and `values` are (key_value_heads, positions, head_dim), the
    new tokens' own among them, at the end.
    """
    tokens, heads, head_dim = queries.shape
    key_value_heads, positions, _ = keys.shape
    if tokens == 1:
        # Heads that share keys stand where tokens stood: no copy of the keys for each of them. The fused operator
        # takes longer to hand one token's work to its threads than these take to do it.
        grouped = queries.reshape(key_value_heads, heads // key_value_heads, head_dim)
        scores = torch.bmm(grouped, keys.transpose(1, 2)).mul_(head_dim**-0.5)
        return torch.bmm(scores.softmax(dim=-1), values).view(1, -1)
    repeats = heads // key_value_heads
    many = keys.repeat_interleave(repeats, dim=0)[None], values.repeat_interleave(repeats, dim=0)[None]
    mask = None
    if positions > tokens:
        mask = torch.ones(tokens, positions, dtype=torch.bool, device=queries.device).tril(positions - tokens)
    attended = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], *many, attn_mask=mask, is_causal=mask is None
    )
    return attended[0].transpose(0, 1).reshape(tokens, -1)
