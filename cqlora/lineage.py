"""Which adapters an adapter was continued from, as its card tells it: a chain, the oldest first.

A continued adapter holds its predecessors' weights already, so whoever merges it must not add them again.
"""

from pathlib import Path
from typing import Any

from cqlora.base import ADAPTER_WEIGHTS, read_card
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
