"""The record as tables: a row for each number, a column for each model, differences to the first."""

from collections.abc import Callable, Iterator
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cqlora.system.documents import escape_controls

if TYPE_CHECKING:
    from rich.console import Console

Record = dict[str, Any]
Row = tuple[str, list[str]]


def show_record(console: "Console", record: Record) -> None:
    """Print a table of each part that was measured, and the first prompt of each task."""
    from rich.table import Table
    from rich.text import Text

    models = record["models"]
    for title, rows in list_tables(models):
        console.print(Text(title, style="bold"), soft_wrap=True)
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("")
        for model in models:
            table.add_column(Text(model["name"]), justify="right", overflow="fold")
        for head, cells in rows:
            table.add_row(Text(head), *map(Text, cells))
        console.print(table)
        console.print()
    for score in models[0].get("choice", []):
        console.print(Text(f"first prompt of {score['task']} with {score['shots']} examples:", style="bold"))
        console.print(Text(escape_controls(score["first_prompt"])), soft_wrap=True)
        console.print()
    for model in models:
        console.print(Text(f"{model['name']}: {model['form']}", style="dim"), soft_wrap=True)


def list_tables(models: list[Record]) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows of each table that the record holds."""
    tables: list[tuple[str, str, Callable[[list[Record]], Iterator[Row]]]] = [
        (
            "text",
            "held-out text (± standard error over documents; in brackets against the first model, paired)",
            text_rows,
        ),
        ("probe", "in-context probe (nats per character of the first and the eighth answer)", probe_rows),
        ("choice", "multiple choice (accuracy ± standard error)", choice_rows),
        ("generations", "greedy generations", generation_rows),
    ]
    for key, title, rows in tables:
        if models[0].get(key):
            yield title, list(rows(models))


def text_rows(models: list[Record]) -> Iterator[Row]:
    """Bits per character and per byte, and what depends on the vocabulary, for every source and language."""
    for place, first in enumerate(models[0]["text"]):
        rows = [model["text"][place] for model in models]
        name = f"{first['source']} ({first['language']}, {first['documents']:,} documents)"
        for key in ("bits_per_character", "bits_per_byte"):
            yield f"{name}: {key.replace('_', ' ')}", [estimate(row, key) for row in rows]
        yield f"{name}: tokens", [f"{row['tokens']:,}" for row in rows]
        yield f"{name}: loss, perplexity", [f"{row['loss']:.3f}, {row['perplexity']:.3f}" for row in rows]


def estimate(row: Record, key: str) -> str:
    """A number with its error, and its difference where there is one."""
    told = with_error(f"{row[key]:.4f}", row[f"{key}_error"])
    difference = row.get(f"{key}_difference")
    if difference is None:
        return told
    return f"{told} ({with_error(f'{difference:+.4f}', row[f'{key}_difference_error'])})"


def with_error(number: str, error: float | None) -> str:
    """A number and, where it is known, its standard error."""
    return number if error is None else f"{number} ±{error:.4f}"


def probe_rows(models: list[Record]) -> Iterator[Row]:
    """First and last loss and the gain of every pattern."""

    def tell(row: Record) -> str:
        gain = with_error(f"{row['gain']:.3f}", row["gain_error"])
        return f"{row['first_loss']:.3f} → {row['last_loss']:.3f}, {gain}"

    for place, first in enumerate(models[0]["probe"]):
        name = f"{first['pattern']} ({first['language']}): first → last, gain"
        yield name, [tell(model["probe"][place]) for model in models]


def choice_rows(models: list[Record]) -> Iterator[Row]:
    """Micro and macro averages of every task, then its subjects."""
    for place, first in enumerate(models[0]["choice"]):
        rows = [model["choice"][place] for model in models]
        name = f"{first['task']}, {first['shots']} examples"
        for key in ("micro", "macro"):
            yield f"{name}: {key}", [with_error(f"{row[key]:.4f}", row[f"{key}_error"]) for row in rows]
        for subject, found in first["subjects"].items():
            scores = [row["subjects"][subject] for row in rows]
            told = [with_error(f"{score['accuracy']:.4f}", score["error"]) for score in scores]
            yield f"  {subject} ({found['questions']})", told


def generation_rows(models: list[Record]) -> Iterator[Row]:
    """Means over the prompts of each language."""
    for language in dict.fromkeys(reply["language"] for reply in models[0]["generations"]):
        replies = [[each for each in model["generations"] if each["language"] == language] for model in models]
        name = f"{len(replies[0])} prompts ({language})"
        for key, what in (("language_share", "share in the language"), ("repetition", "repeated 4-grams")):
            yield f"{name}: {what}", [f"{fmean(reply[key] for reply in each):.1%}" for each in replies]
        yield f"{name}: tokens", [f"{fmean(reply['tokens'] for reply in each):.1f}" for each in replies]
        yield f"{name}: ended by themselves", [f"{sum(r['ended'] for r in each)} of {len(each)}" for each in replies]
