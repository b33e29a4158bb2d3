"""metrics.jsonl, which pages, sweeps and checks read of a run: one flat object a line."""

import hashlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from cqlora.system.durable import replace_file, sync
from cqlora.system.refusals import NoRoom, described_as_sentence
from cqlora.system.sealed import hash_file

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Every whole line of a run; a last one that a kill cut short is left out, a damaged one too, with a warning."""
    file = run_folder / METRICS_FILE
    if not file.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        row = read_line(line)
        if row is None:
            logger.warning("%s, line %d is damaged and left out", file, number)
        else:
            rows.append(row)
    return rows


def measure_metrics(run_folder: Path) -> dict[str, Any]:
    """Bytes and sha256 of metrics.jsonl as it is now, once the disk has it: what a checkpoint says of it."""
    file = run_folder / METRICS_FILE
    if not file.is_file():
        return {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    with described_as_sentence(file):
        sync(file)
        return {"bytes": file.stat().st_size, "sha256": hash_file(file)}


def begins_as(file: Path, measured: dict[str, Any]) -> bool:
    """Whether a file's first bytes are those that were measured."""
    with described_as_sentence(file), file.open("rb") as stream:
        return bool(hashlib.sha256(stream.read(measured["bytes"])).hexdigest() == measured["sha256"])


def read_line(line: bytes) -> dict[str, Any] | None:
    """The line's object; None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row
    return row if known and (row["kind"] == "event" or "loss" in row) else None


def rewind_metrics(run_folder: Path, step: int) -> None:
    """Drop what a resumed run will write again: training and evaluation lines after `step`.

    Events stay, since they happened. The file is replaced whole, so a kill here loses nothing.
    """
    rows = [row for row in read_metrics(run_folder) if row["kind"] == "event" or row["step"] <= step]
    replace_file(run_folder / METRICS_FILE, "".join(to_line(row) for row in rows).encode())


def mean_loss(evaluations: list[dict[str, Any]]) -> float | None:
    """Mean over all tokens of an evaluation's lines: each source weighs as many tokens as were evaluated of it."""
    tokens = sum(row["tokens"] for row in evaluations)
    return sum(float(row["loss"]) * row["tokens"] for row in evaluations) / tokens if tokens else None


def append_metrics(run_folder: Path, row: dict[str, Any]) -> None:
    """Add one line, at once readable by others.

    Raises:
        DiskError: the disk refused; the file ends as it did before.
    """
    file = run_folder / METRICS_FILE
    with described_as_sentence(file), file.open("ab+", buffering=0) as stream:
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, end - 1))
        # A line that a kill cut short stays a line of its own.
        begun = end > 0 and stream.read(1) != b"\n"
        line = b"\n" * begun + to_line(row).encode()
        if (written := stream.write(line)) < len(line):
            stream.truncate(end)
            raise NoRoom(len(line) - written)


def to_line(row: dict[str, Any]) -> str:
    """One JSON line; a non-finite number becomes its name, since JSON has none."""
    finite = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(finite, ensure_ascii=False) + "\n"
