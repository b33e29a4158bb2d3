"""The script a text is written in, which stands for its language where a source names none."""

from functools import cache
from typing import NamedTuple

import numpy as np

SAMPLE_CHARACTERS = 2048

ZH_SHARE = 0.2
"""Han letters from which a text counts as Chinese: a Han letter says as much as several Latin ones."""
EN_SHARE = 0.02
"""Han letters below which a text counts as English (any Latin script)."""

_RANGES = (
    ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
    ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)),
    ((0x370, 0x1FFF), (0x3040, 0x30FF), (0xAC00, 0xD7AF)),
)
"""Inclusive ranges of Han, Latin and other letters."""
_HAN = 1


class Letters(NamedTuple):
    """How many letters of each script a text has."""

    han: int
    latin: int
    other: int


def count_letters(text: str) -> Letters:
    """Letters of each script in the first SAMPLE_CHARACTERS of `text`."""
    scripts = script_table()[code_points(text[:SAMPLE_CHARACTERS])]
    return Letters(*np.bincount(scripts, minlength=len(_RANGES) + 1)[1:].tolist())


def detect_language(text: str) -> str:
    """`zh`, `en` or `mixed`, by the share of Han letters."""
    letters = count_letters(text)
    total = sum(letters)
    share = letters.han / total if total else 0.0
    if share >= ZH_SHARE:
        return "zh"
    return "en" if letters.latin and share <= EN_SHARE and letters.latin * 2 >= total else "mixed"


def own_share(text: str, language: str) -> float:
    """Share of a language's own script among the letters of `text`; 1 for a text without letters."""
    letters = count_letters(text)
    total = sum(letters)
    if not total or language not in ("zh", "en"):
        return 1.0
    return (letters.han if language == "zh" else letters.latin) / total


def han_characters(text: str) -> np.ndarray:
    """bool (characters,): which characters of `text` are Han."""
    is_han: np.ndarray = script_table()[code_points(text)] == _HAN
    return is_han


def code_points(text: str) -> np.ndarray:
    """uint32 (characters,): the code points of `text`."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


@cache
def script_table() -> np.ndarray:
    """uint8 (code points,): 0 for what is no letter, else 1, 2 or 3 for Han, Latin or another script."""
    table = np.zeros(0x110000, dtype=np.uint8)
    for script, ranges in enumerate(_RANGES, start=1):
        for low, high in ranges:
            table[low : high + 1] = script
    return table
