"""Where an adapter comes from, as its card says: its base, and the adapters it was continued from, oldest first.

A continued adapter holds its predecessors' weights already, so whoever merges it must not add them again.
"""

from pathlib import Path
from typing import Any

from cqlora.base import ADAPTER_WEIGHTS, read_card, verify_adapter
from cqlora.errors import ModelError
from cqlora.system.fingerprints import VERSION
from cqlora.system.sealed import hash_file


def describe_lineage(init_adapter: str) -> dict[str, Any]:
    """What the card of an adapter that begins as `init_adapter` says of its past; an empty path begins anew.

    `init_adapter` holds the predecessor's path and the sha256 of its weights, `lineage` all predecessors, each
    `{"adapter_sha256": …, "how": "continued"}`.
    """
    if not init_adapter:
        return {"init_adapter": None, "lineage": []}
    folder = Path(init_adapter)
    digest = hash_file(folder / ADAPTER_WEIGHTS)
    return {
        "init_adapter": {"path": init_adapter, "adapter_sha256": digest},
        "lineage": [*read_card(folder).get("lineage", []), {"adapter_sha256": digest, "how": "continued"}],
    }


def check_fingerprints(adapter: Path, tokenizer_sha256: str, base_sha256: str) -> None:
    """Raise ModelError when an adapter was damaged, or its card names another tokenizer or base than these."""
    verify_adapter(adapter)
    card = read_card(adapter)
    for key, actual, what in (
        ("tokenizer_sha256", tokenizer_sha256, "tokenizer"),
        ("base_sha256", base_sha256, "base"),
    ):
        stated = str(card.get(key, actual))
        if not stated.startswith(VERSION):
            raise ModelError(
                f"adapter {adapter} names its {what} by samples of its bytes, as an older cqlora did, which cannot be "
                f"checked; if its base is surely this one, remove {key} and card_sha256 from its cqlora.json."
            )
        if stated != actual:
            raise ModelError(
                f"adapter {adapter} was trained on another {what} ({card.get('base', 'unknown')}, {what} "
                f"{stated[:15]}, here {actual[:15]}); give the base that it was trained on."
            )
