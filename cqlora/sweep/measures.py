"""The numbers of evaluation.json under the names that runs are compared by."""

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from cqlora.config.sweeps import EVALUATED
from cqlora.system.metrics import MEASURES

Row = dict[str, Any]
_PROBE = ("gain", "first_loss", "last_loss")
_CHOICE = ("micro", "macro")
_REPLIES = ("language_share", "repetition", "tokens", "ended")


def list_measures(model: dict[str, list[Row]]) -> Iterator[tuple[str, list[Row], str]]:
    """Name, rows, and the key whose mean over the rows it is, of all that a model of evaluation.json holds.

    What is known before anything is measured is rows without numbers, which give the names.
    """
    for row in model.get("text", []):
        for key in MEASURES:
            yield f"{EVALUATED}text/{row['source']}/{row['language']}/{key}", [row], key
    for row in model.get("probe", []):
        for key in _PROBE:
            yield f"{EVALUATED}probe/{row['pattern']}/{row['language']}/{key}", [row], key
    for row in model.get("choice", []):
        for key in _CHOICE:
            yield f"{EVALUATED}choice/{row['task']}/{row['shots']}/{key}", [row], key
    replies = model.get("generations", [])
    for language in dict.fromkeys(row["language"] for row in replies):
        for key in _REPLIES:
            yield f"{EVALUATED}generations/{language}/{key}", [r for r in replies if r["language"] == language], key


def name_measures(model: dict[str, list[Row]]) -> dict[str, float]:
    """The numbers of a model of evaluation.json; what is not finite is null there, and left out."""
    return {
        name: fmean(float(row[key]) for row in rows)
        for name, rows, key in list_measures(model)
        if all(row[key] is not None for row in rows)
    }
