"""Changing a card as cqlora itself would have written it."""

from pathlib import Path
from typing import Any

from cqlora.base import read_card, seal_card


def change_card(folder: Path, **changed: Any) -> None:
    """Give the folder's card other values, sealed anew over the files that are there."""
    seal_card(folder, read_card(folder) | changed)
