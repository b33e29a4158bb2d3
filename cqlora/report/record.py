"""A run's metrics.jsonl as a page shows it: curves, held-out numbers before and after, and what happened."""

import math
from statistics import median
from typing import Any

from cqlora.report.columns import as_number, pack_column, thin
from cqlora.system.metrics import MEASURES, complete_evaluations, mean_loss

Row = dict[str, Any]
MOST_REPLIES = 4
"""To one prompt, side by side."""


def describe_curves(rows: list[Row], most_points: int) -> dict[str, Any]:
    """Training lines as packed columns of at most `most_points` numbers.

    Returns:
        `points`, `lines` (how many there were before neighbours were joined), `columns` by name, and the time that
        each line stood at in `columns["elapsed"]`, in seconds of training.
    """
    lines = [row for row in rows if row.get("kind") == "train"]
    elapsed = 0.0
    for line in lines:
        seconds = as_number(line.get("seconds"))
        elapsed += seconds if math.isfinite(seconds) else 0.0
        line["elapsed"] = elapsed
    thinned = thin(lines, most_points)
    names = list(dict.fromkeys(key for row in thinned for key in row if key != "kind"))
    columns = {name: pack_column(name, [row.get(name) for row in thinned]) for name in names}
    return {"points": len(thinned), "lines": len(lines), "columns": columns}


def describe_evaluations(rows: list[Row]) -> list[dict[str, Any]]:
    """Held-out numbers as series, one for each source and language in the order of their first line.

    A series has lists of `step`, `tokens` (seen in training by then), `elapsed` seconds and each of `MEASURES`.
    """
    series: dict[tuple[str, str], dict[str, Any]] = {}
    tokens, elapsed = 0.0, 0.0
    for row in rows:
        if row.get("kind") == "train":
            tokens, elapsed = as_number(row.get("tokens")), as_number(row.get("elapsed"))
        elif row.get("kind") == "eval":
            key = (str(row.get("source", "")), str(row.get("language", "")))
            one = series.setdefault(key, {"source": key[0], "language": key[1], "scored": row.get("tokens")})
            numbers = {"step": row["step"], "seen": tokens, "elapsed": elapsed}
            numbers |= {name: row.get(name) for name in MEASURES}
            for name, value in numbers.items():
                number = as_number(value)
                one.setdefault(name, []).append(number if math.isfinite(number) else None)
    return list(series.values())


def describe_values(rows: list[Row]) -> dict[str, float]:
    """The numbers that runs are compared by, under dotted names as sweeps record them.

    They are of the last complete evaluation. `eval/loss` is the mean over all held-out tokens;
    `zh/bits_per_character` and its like join all sources of a language by what they hold, and `…/gain` is what the
    run took off the number that it began with.
    """
    values: dict[str, float] = {}
    train = [row for row in rows if row.get("kind") == "train"]
    if train:
        last = train[-1]
        values |= {f"train/{key}": as_number(last.get(key)) for key in ("loss", "tokens")}
        values["train/seconds"] = sum(filter(math.isfinite, (as_number(row.get("seconds")) for row in train)))
        values["train/peak_memory_gib"] = max(as_number(row.get("peak_memory_gib")) for row in train)
        values["train/tokens_per_second"] = median(as_number(row.get("tokens_per_second")) for row in train)
    evaluations = list(complete_evaluations(rows).values())
    if evaluations:
        first, last = join_languages(evaluations[0]), join_languages(evaluations[-1])
        for key, number in last.items():
            values[f"eval/{key}"] = number
            if key in first and len(evaluations) > 1:
                values[f"eval/{key}/gain"] = first[key] - number
    return {key: number for key, number in values.items() if math.isfinite(number)}


def join_languages(rows: list[Row]) -> dict[str, float]:
    """Bits per character and byte of each language over all its sources, and the loss over all tokens.

    A line gives its bits (loss x tokens / ln 2) and, divided by its bits per character or byte, how many of them it
    was scored on; both add up over sources.
    """
    bits: dict[str, float] = {}
    units: dict[tuple[str, str], float] = {}
    for row in (row for row in rows if row["kind"] == "eval"):
        language = row["language"]
        here = float(row["loss"]) * row["tokens"] / math.log(2)
        bits[language] = bits.get(language, 0.0) + here
        for name in ("bits_per_character", "bits_per_byte"):
            rate = as_number(row.get(name))
            counted = here / rate if rate else math.nan
            units[language, name] = units.get((language, name), 0.0) + counted
    joined = {f"{language}/{name}": bits[language] / count for (language, name), count in units.items() if count}
    loss = mean_loss(rows)
    return joined | ({} if loss is None else {"loss": loss})


def describe_replies(rows: list[Row]) -> list[dict[str, Any]]:
    """What the run replied to its prompts, as models of an evaluation: at its start, its end and evenly between."""
    by_step: dict[int, list[Row]] = {}
    for row in rows:
        if row["kind"] == "reply":
            by_step.setdefault(row["step"], []).append(row)
    steps = sorted(by_step)
    last = len(steps) - 1
    places = sorted({round(last * place / (MOST_REPLIES - 1)) for place in range(MOST_REPLIES)}) if steps else []
    return [{"step": steps[place], "generations": by_step[steps[place]]} for place in places]


def describe_events(rows: list[Row]) -> list[dict[str, Any]]:
    """Events with their step and details, checkpoints aside, which come by the clock."""
    events = [row for row in rows if row.get("kind") == "event" and row.get("event") != "checkpoint"]
    return [
        {
            "step": row["step"],
            "event": str(row.get("event", "")),
            "details": {key: value for key, value in row.items() if key not in ("kind", "step", "event")},
        }
        for row in events
    ]
