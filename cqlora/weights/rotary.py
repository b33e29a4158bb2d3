"""The rotary embedding: how a config.json scales it, its frequencies, and the two orders of a head's dimensions.

Meta's code (and llama.cpp's) rotates neighbours (2i, 2i+1) of a head's dimensions; Hugging Face's rotates
(i, i + d/2). The same function is computed once the rows of the query and key projections are reordered.
"""

import math
from typing import Any

import torch


def read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and what else the scaling has, in any of the spellings that transformers has used.

    transformers 5 writes `rope_parameters`; before it stood `rope_theta` and `rope_scaling`, whose kind was `type`
    until 4.43 and `rope_type` since.
    """
    rope = {"rope_theta": config.get("rope_theta") or 10_000.0}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.pop("type", "default")
    return {"rope_type": kind} | rope


def base_frequencies(rope: dict[str, Any], head_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(head_dim / 2,): radians per position, before any scaling."""
    frequencies: torch.Tensor = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim))
    return frequencies


def scale_frequencies(rope: dict[str, Any], frequencies: torch.Tensor, max_length: int) -> torch.Tensor:
    """The frequencies as `rope_type` scales them: default, linear, or llama3 (transformers, modeling_rope_utils)."""
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]  # type: ignore[no-any-return]
    if rope["rope_type"] != "llama3":
        return frequencies
    original = rope.get("original_max_position_embeddings") or max_length
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled: torch.Tensor = torch.where(wavelengths > original / low, frequencies / factor, between)
    return torch.where(wavelengths < original / high, frequencies, scaled)


def interleaved_to_halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of whole heads, [heads·head_dim, …], from neighbours to halves."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def halves_to_interleaved(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of interleaved_to_halves."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
