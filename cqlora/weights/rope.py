"""How a config.json scales its rotary embedding, in any of the spellings that transformers has used."""

from typing import Any


def read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and what else the scaling has.

    transformers 5 writes `rope_parameters`; before it stood `rope_theta` and `rope_scaling`, whose kind was `type`
    until 4.43 and `rope_type` since.
    """
    rope = {"rope_theta": config.get("rope_theta") or 10_000.0}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.pop("type", "default")
    return {"rope_type": kind} | rope
