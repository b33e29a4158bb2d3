"""metrics.jsonl, the record of a run that pages, sweeps and checks read: one flat object a line."""

import json
import math
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's record; a line that a kill cut short is not one."""
    file = folder / METRICS_FILE
    if not file.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in file.read_bytes().split(b"\n")[:-1]:
        rows.append(json.loads(line))
    return rows


def rewind_metrics(folder: Path, step: int) -> None:
    """Drop what a resumed run will write again: training and evaluation lines after `step`.

    Events stay, since they happened. The record is replaced whole, so a kill here loses nothing.
    """
    rows = [row for row in read_metrics(folder) if row["kind"] == "event" or row["step"] <= step]
    staged = folder / f".{METRICS_FILE}.staging"
    staged.write_text("".join(to_line(row) for row in rows), encoding="utf-8")
    staged.replace(folder / METRICS_FILE)


def mean_loss(evaluations: list[dict[str, Any]]) -> float | None:
    """Mean over all tokens of an evaluation's lines: each source weighs as many tokens as were scored of it."""
    tokens = sum(row["tokens"] for row in evaluations)
    return sum(float(row["loss"]) * row["tokens"] for row in evaluations) / tokens if tokens else None


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Add one line, at once readable by others."""
    with (folder / METRICS_FILE).open("a", encoding="utf-8") as stream:
        stream.write(to_line(row))


def to_line(row: dict[str, Any]) -> str:
    """One JSON line; a non-finite number becomes its name, since JSON has none."""
    finite = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(finite, ensure_ascii=False) + "\n"
