"""The two orders of a rotary embedding's dimensions within a head.

Meta's code (and llama.cpp's) rotates neighbours (2i, 2i+1) of a head's dimensions; Hugging Face's rotates
(i, i + d/2). The same function is computed once the rows of the query and key projections are reordered.
"""

import torch


def interleaved_to_halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of whole heads, [heads·head_dim, …], from neighbours to halves."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def halves_to_interleaved(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of interleaved_to_halves."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
