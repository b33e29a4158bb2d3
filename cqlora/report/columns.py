"""Numbers of a curve in as little room as a page can hold them in."""

import base64
import math
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

Column = dict[str, Any]

_WHOLE = {"step", "tokens"}
"""Counted in whole numbers, which 32 bits of a floating-point number would round."""


def pack_column(name: str, values: Sequence[object]) -> Column:
    """A column as the page reads it: its numbers' type, and their bytes.

    The bytes lie by significance (all first bytes, then all second ones), which compresses better, then as zlib's
    stream in base64. What is no finite number, as a loss that was not, is NaN.

    Args:
        name: the column's, which tells whether its numbers are whole.
        values: one for each line; None where a line has none.
    """
    kind = "<f8" if name in _WHOLE else "<f4"
    numbers = np.array([as_number(value) for value in values], dtype=kind)
    shuffled = numbers.view(np.uint8).reshape(len(numbers), numbers.itemsize).T.tobytes()
    return {"type": kind[1:], "data": base64.b64encode(zlib.compress(shuffled, 6)).decode("ascii")}


def unpack_column(column: Column) -> np.ndarray:
    """(n,) the numbers of a packed column; what the page does in the browser."""
    shuffled = np.frombuffer(zlib.decompress(base64.b64decode(column["data"])), dtype=np.uint8)
    size = int(column["type"][1])
    return np.frombuffer(shuffled.reshape(size, -1).T.tobytes(), dtype=f"<{column['type']}")


def as_number(value: object) -> float:
    """A number of a record's line; NaN for what is none, since lines are also written by other programs."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def thin(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` lines: each the means over as many neighbours, at the last one's step, tokens and seconds."""
    if len(rows) <= most:
        return rows
    bounds = np.linspace(0, len(rows), most + 1).round().astype(int)
    return [_mean(rows[first:last]) for first, last in pairwise(bounds)]


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Neighbouring lines as one; a number that one of them lacks is the mean of the others'."""
    merged = dict(rows[-1])
    for key in {key for row in rows for key in row} - {"kind", "step", "tokens", "seconds"}:
        numbers = [number for row in rows if math.isfinite(number := as_number(row.get(key)))]
        merged[key] = sum(numbers) / len(numbers) if numbers else math.nan
    return merged
