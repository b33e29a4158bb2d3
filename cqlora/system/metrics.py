"""metrics.jsonl, which pages, sweeps and checks read of a run: one flat object a line."""

import hashlib
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from cqlora.system.durable import replace_file, sync
from cqlora.system.journal import append_object, read_objects, tell_damage, to_line
from cqlora.system.refusals import described_as_sentence
from cqlora.system.sealed import SEAL, hash_document, hash_file

METRICS_FILE = "metrics.jsonl"
MEAN_LOSS = "eval/loss"
"""The held-out loss over all sources, to compare runs by."""
MEASURES = ("loss", "perplexity", "bits_per_character", "bits_per_byte")
"""What an evaluation line holds of a source and language."""
REPLY_MEASURES = ("language_share", "repetition")
"""What a line of a reply holds that is compared: shares of its letters and of its 4-grams."""
_MOST = 1 << 62
"""Of any count; a longer number is damage."""


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Every whole line of a run; a last one that a kill cut short is left out, a damaged one too, with a warning."""
    file = run_folder / METRICS_FILE
    rows: list[dict[str, Any]] = []
    for number, row in read_objects(file):
        if row is None or not is_row(row) or not is_as_written(row):
            tell_damage(file, number)
        else:
            rows.append(row)
    return rows


def is_row(row: dict[str, Any]) -> bool:
    """Whether an object is a line of a record, with what every reader takes of its kind."""
    kind, step = row.get("kind"), row.get("step")
    if type(step) is not int or not 0 <= step <= _MOST or any(type(v) is int and abs(v) > _MOST for v in row.values()):
        return False
    if kind == "event":
        return isinstance(row.get("event"), str)
    if kind == "evaluation":
        return all(is_number(value) for key, value in row.items() if key != "kind")
    if kind == "reply":
        told = all(isinstance(row.get(key), str) for key in ("prompt", "language", "reply"))
        return told and all(is_number(row.get(key)) for key in REPLY_MEASURES)
    named = kind == "train" or all(isinstance(row.get(key), str) for key in ("source", "language"))
    counted = kind != "eval" or (type(row.get("tokens")) is int and row["tokens"] >= 0)
    return isinstance(kind, str) and named and counted and is_number(row.get("loss"))


def is_number(value: object) -> bool:
    """Whether a value is a number as a line has it; what is not finite stands there by its name."""
    return type(value) in (int, float) or value in ("nan", "inf", "-inf")


def seal_event(row: dict[str, Any]) -> dict[str, Any]:
    """An event with the sha256 of what it says: a checkpoint's own is in no checkpoint. Other lines are as given."""
    if row["kind"] != "event":
        return row
    said: dict[str, Any] = json.loads(to_line(row))
    return {**said, SEAL: hash_document(said)}


def is_as_written(row: dict[str, Any]) -> bool:
    """Whether a line says what it was sealed with, which it loses; lines without a seal pass."""
    seal = row.pop(SEAL, None)
    return seal is None or bool(seal == hash_document(row))


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


def rewind_metrics(run_folder: Path, step: int) -> None:
    """Drop what a resumed run will write again: training and evaluation lines after `step`.

    Events stay, since they happened. The file is replaced whole, so a kill here loses nothing.
    """
    rows = [row for row in read_metrics(run_folder) if row["kind"] == "event" or row["step"] <= step]
    replace_file(run_folder / METRICS_FILE, "".join(to_line(seal_event(row)) for row in rows).encode())


def mean_loss(evaluations: list[dict[str, Any]]) -> float | None:
    """Mean over all tokens of an evaluation's lines: each source weighs as many tokens as were evaluated of it."""
    scored = [row for row in evaluations if row["kind"] == "eval"]
    tokens = sum(row["tokens"] for row in scored)
    return sum(float(row["loss"]) * row["tokens"] for row in scored) / tokens if tokens else None


def name_values(row: dict[str, Any]) -> dict[str, float]:
    """A line's finite numbers under the names that runs are compared by: `train/loss`, `eval/wiki_zh/zh/loss`."""
    if row["kind"] in ("event", "reply"):
        return {}
    prefix = row["kind"] if row["kind"] in ("train", "evaluation") else f"eval/{row['source']}/{row['language']}"
    return {
        f"{prefix}/{key}": value
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def evaluated_values(run_folder: Path) -> dict[int, dict[str, float]]:
    """What each complete evaluation of a run measured, by step, under the names that runs are compared by."""
    rows = read_metrics(run_folder)
    values = {step: _values_of(found) for step, found in complete_evaluations(rows).items()}
    for step, found in _group_whole(rows, ("reply",)).items():
        values.setdefault(step, {}).update(name_replies(found))
    for row in rows:
        if row["kind"] == "evaluation":
            values.setdefault(row["step"], {}).update(name_values(row))
    return values


def complete_evaluations(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The lines of each evaluation by step, the probe's too; it is complete with as many as the first, at step 0."""
    return _group_whole(rows, ("eval", "probe"))


def name_replies(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The means over an evaluation's replies in each language, under the names that runs are compared by."""
    return {
        f"eval/generations/{language}/{measure}": fmean(
            float(row[measure]) for row in rows if row["language"] == language
        )
        for language in dict.fromkeys(row["language"] for row in rows)
        for measure in REPLY_MEASURES
    }


def _group_whole(rows: list[dict[str, Any]], kinds: tuple[str, ...]) -> dict[int, list[dict[str, Any]]]:
    """The lines of some kinds by step; a step that has less of them than the first is not whole, and left out."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] in kinds:
            by_step.setdefault(row["step"], []).append(row)
    lines = len(by_step.get(0, []))
    return {step: found for step, found in by_step.items() if len(found) >= lines}


def _values_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    loss = mean_loss(rows)
    mean = {MEAN_LOSS: loss} if loss is not None and math.isfinite(loss) else {}
    return mean | {name: value for row in rows for name, value in name_values(row).items()}


def append_metrics(run_folder: Path, row: dict[str, Any]) -> None:
    """Add one line, at once readable by others.

    Raises:
        DiskError: the disk refused; the file ends as it did before.
    """
    append_object(run_folder / METRICS_FILE, seal_event(row))
