"""How a model's positions are scaled: what its config.json says, and what a run puts there in its place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cqlora.config.choices import RopeScaling
from cqlora.errors import ModelError

POSITIONS = "positions"
"""Key of an adapter's card: how the positions of its base were scaled while it trained; absent where they were not."""
_THETA = {"smollm3": 2_000_000.0}
"""transformers' default of rope_theta by kind, where it is not 10,000."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Llama 3.1's own bounds (Meta's llama-models, apply_scaling)."""


def read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and what else the scaling has, in any of the spellings that transformers has used.

    transformers 5 writes `rope_parameters`; before it stood `rope_theta` and `rope_scaling`, whose kind was `type`
    until 4.43 and `rope_type` since.
    """
    rope = {"rope_theta": config.get("rope_theta") or _THETA.get(config.get("model_type", ""), 10_000.0)}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.pop("type", "default")
    return {"rope_type": kind} | rope


def scale_positions(config: dict[str, Any], scaling: RopeScaling, factor: float, folder: Path) -> dict[str, Any]:
    """config.json of a base whose positions are scaled to `factor` times as many.

    Linear interpolation (2306.15595), YaRN (2309.00071) with the paper's bounds, or Llama 3.1's.

    Raises:
        ModelError: the base's own positions are scaled already.
    """
    if scaling is RopeScaling.none:
        return config
    rope, original = read_rope(config), config["max_position_embeddings"]
    if rope["rope_type"] != "default":
        raise ModelError(
            f"model.rope_scaling={scaling.name}, and {folder} scales its positions by {rope['rope_type']} already; "
            "leave model.rope_scaling out."
        )
    scaled = {"rope_type": scaling.name, "factor": factor}
    if scaling is not RopeScaling.linear:
        scaled["original_max_position_embeddings"] = original
    if scaling is RopeScaling.llama3:
        scaled |= _LLAMA3
    longest = {"max_position_embeddings": int(original * factor)}
    # In the spelling of the base, which whoever reads that knows.
    if "rope_parameters" in config:
        return config | longest | {"rope_parameters": {"rope_theta": rope["rope_theta"], **scaled}}
    return config | longest | {"rope_theta": rope["rope_theta"], "rope_scaling": scaled}


def describe_positions(scaling: RopeScaling, factor: float) -> dict[str, Any]:
    """What the card of an adapter says of the positions that it trained with."""
    return {} if scaling is RopeScaling.none else {POSITIONS: {"rope_scaling": scaling.name, "rope_factor": factor}}


def read_positions(card: dict[str, Any], file: Path) -> tuple[RopeScaling, float]:
    """The scaling that an adapter's card tells of, and its factor.

    Raises:
        ModelError: what the card says is no scaling.
    """
    stated = card.get(POSITIONS, {})
    try:
        return RopeScaling[stated.get("rope_scaling", "none")], float(stated.get("rope_factor", 1.0))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file} has {POSITIONS} that are no scaling; restore the file.") from error


def scale_as_trained(
    config: dict[str, Any], cards: Sequence[tuple[dict[str, Any], Path]], base: Path
) -> dict[str, Any]:
    """config.json of a base as adapters were trained on it, by their cards and the files that hold these.

    Raises:
        ModelError: they were trained with scalings that differ, or the base has one of its own.
    """
    found = {read_positions(card, file): file for card, file in cards}
    scaled = [positions for positions in found if positions[0] is not RopeScaling.none]
    if len(scaled) > 1:
        one, other = (found[positions] for positions in scaled[:2])
        raise ModelError(
            f"{one} and {other} tell of differently scaled positions, of which a model has one; merge adapters that "
            "were trained alike."
        )
    return scale_positions(config, *scaled[0], base) if scaled else config
