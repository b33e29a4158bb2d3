"""The shape of a model that the engine runs, read from config.json, and the rotary embedding that follows from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cqlora.architectures import (
    Part,
    find_biases,
    find_head_dim,
    find_unrotated_layers,
    has_head_norms,
    require_known,
    ties_embeddings,
)
from cqlora.errors import ModelError
from cqlora.positions import read_rope
from cqlora.weights.rotary import base_frequencies, rotation_size, scale_frequencies

MOST_POSITIONS = 1 << 22
"""The angles of every position are kept: a gigabyte for so many."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the decoder needs to know beside the weights."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    epsilon: float
    """Of RMSNorm."""
    max_length: int
    """Positions that the model was made for."""
    rope: dict[str, Any]
    """`rope_type`, `rope_theta` and what the type needs."""
    unrotated: frozenset[int] = frozenset()
    """Layers without rotary embedding."""
    biases: frozenset[str] = frozenset()
    """Linear layers of a block that have a bias."""
    head_norms: bool = False
    """Whether each head's queries and keys are normalised before they are rotated."""

    @property
    def block_numbers(self) -> int:
        """Numbers in the matrices of all blocks."""
        attention = 2 * (self.heads + self.key_value_heads) * self.head_dim
        return self.layers * self.hidden * (attention + 3 * self.intermediate)


def read_architecture(config: dict[str, Any], folder: Path) -> Architecture:
    """The architecture that a config.json describes, in transformers' older or newer names.

    Raises:
        ModelError: another architecture, or a part of one that the decoder does not have.
    """
    require_known(Part.engine, config, folder)
    heads = config["num_attention_heads"]
    longest = config["max_position_embeddings"]
    if not isinstance(longest, int) or not 1 < longest <= MOST_POSITIONS:
        raise ModelError(
            f"{folder} has max_position_embeddings={longest}; the engine holds 2 to {MOST_POSITIONS} positions."
        )
    return Architecture(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=heads,
        key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=find_head_dim(config),
        vocab_size=config["vocab_size"],
        tied=ties_embeddings(config),
        epsilon=config.get("rms_norm_eps", 1e-6),
        max_length=longest,
        rope=_read_rope(config, folder),
        unrotated=frozenset(find_unrotated_layers(config)),
        biases=frozenset(find_biases(config)),
        head_norms=has_head_norms(config),
    )


def rotary_tables(rope: dict[str, Any], head_dim: int, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32 (max_length, head_dim / 2), that each position's pairs of dimensions turn by."""
    frequencies = scale_frequencies(rope, base_frequencies(rope, head_dim), max_length)
    angles, size = torch.arange(max_length, dtype=torch.float32)[:, None] * frequencies, rotation_size(rope)
    return angles.cos() * size, angles.sin() * size


def _read_rope(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    rope = read_rope(config)
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        raise ModelError(
            f"{folder} scales positions by rope_type={rope['rope_type']}, and the engine runs default, linear, llama3 "
            "and yarn; run this one with transformers or vLLM."
        )
    return rope
