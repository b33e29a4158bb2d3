"""Changing a card as cqlora itself would have written it, and doing without one."""

from pathlib import Path
from typing import Any

from cqlora.base import CARD, read_card, seal_card


def change_card(folder: Path, **changed: Any) -> None:
    """Give the folder's card other values, sealed anew over the files that are there."""
    seal_card(folder, read_card(folder) | changed)


def drop_card(folder: Path) -> Path:
    """Make a base one from elsewhere, which says nothing of itself and may be changed; return its folder."""
    (folder / CARD).unlink()
    return folder
