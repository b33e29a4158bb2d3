"""The rotary embedding: its frequencies, scaled or not, and the two orders of a head's dimensions.

Meta's code (and llama.cpp's) rotates neighbours (2i, 2i+1) of a head's dimensions; Hugging Face's rotates
(i, i + d/2). The same function is computed once the rows of the query and key projections are reordered.
"""

import math
from typing import Any

import torch


def base_frequencies(rope: dict[str, Any], head_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(head_dim / 2,): radians per position, before any scaling."""
    frequencies: torch.Tensor = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim))
    return frequencies


def scale_frequencies(rope: dict[str, Any], frequencies: torch.Tensor, max_length: int) -> torch.Tensor:
    """The frequencies as `rope_type` scales them: default, linear, llama3 or yarn (transformers, modeling_rope_utils).

    `max_length` is the positions of the unscaled model where `rope` does not say them.
    """
    original = rope.get("original_max_position_embeddings") or max_length
    match rope["rope_type"]:
        case "linear":
            return frequencies / rope["factor"]  # type: ignore[no-any-return]
        case "llama3":
            return _scale_as_llama3(rope, frequencies, original)
        case "yarn":
            return _scale_as_yarn(rope, frequencies, original)
    return frequencies


def rotation_size(rope: dict[str, Any]) -> float:
    """By what YaRN multiplies cosines and sines, which sharpens attention (2309.00071, equation 22); others by 1."""
    if rope["rope_type"] != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _sharpening(rope["factor"], rope["mscale"]) / _sharpening(rope["factor"], rope["mscale_all_dim"])
    return _sharpening(rope["factor"])


def _sharpening(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _scale_as_llama3(rope: dict[str, Any], frequencies: torch.Tensor, original: int) -> torch.Tensor:
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled: torch.Tensor = torch.where(wavelengths > original / low, frequencies / factor, between)
    return torch.where(wavelengths < original / high, frequencies, scaled)


def _scale_as_yarn(rope: dict[str, Any], frequencies: torch.Tensor, original: int) -> torch.Tensor:
    """Divide slow frequencies, leave fast ones, and go from one to the other in between (2309.00071, section 3.2)."""
    dimensions = 2 * len(frequencies)

    def dimension_that_turns(times: float) -> float:
        return dimensions * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    first = dimension_that_turns(rope.get("beta_fast") or 32)
    last = dimension_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dimensions - 1)
    # Equal ends would divide by zero.
    places = torch.arange(len(frequencies), dtype=torch.float32)
    slowness = ((places - first) / ((last - first) or 0.001)).clamp(0, 1).to(frequencies)
    scaled: torch.Tensor = frequencies / rope["factor"] * slowness + frequencies * (1 - slowness)
    return scaled


def interleaved_to_halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of whole heads, [heads·head_dim, …], from neighbours to halves."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def halves_to_interleaved(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of interleaved_to_halves."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
