"""`python -m cqlora.prepare`: builds a run's token cache and says what is in it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from cqlora.architectures import Part, require_known
from cqlora.cli import run_program
from cqlora.config.schema import RunConfig
from cqlora.launch.settle import find_template, read_adapter, settle_template
from cqlora.random_base import open_base
from cqlora.system.documents import escape_controls
from cqlora.system.signals import stop_on_signals

SHOWN_CHARACTERS = 600
"""Of each example in the terminal; examples.html holds them whole."""


def prepare(config: RunConfig) -> None:
    """Build or open the cache, print its table and an example of each source, write examples.html beside it."""
    from tokenizers import Tokenizer

    from cqlora.data.cache import prepare_cache
    from cqlora.data.examples import pick_examples, render_html
    from cqlora.data.sources import find_sources
    from cqlora.system.durable import replace_file
    from cqlora.system.progress import StageDisplay, open_console, show_log

    show_log()
    find_sources(config.data, config.stage.name)
    base = open_base(config.model)
    adapter = read_adapter(Path(config.stage.init_adapter)) if config.stage.init_adapter else None
    template = find_template(config.stage, base)
    config = replace(config, stage=settle_template(config.stage, template, adapter, {}))
    require_known(Part.train, base.config, base.path, config.stage.sequence_length)
    with StageDisplay(is_main=True) as display:
        cache = prepare_cache(config, base, display.show)
    examples = pick_examples(cache, Tokenizer.from_file(str(base.tokenizer_file)))
    page = cache.folder / "examples.html"
    replace_file(page, render_html(f"data={config.data.name} stage={config.stage.name}", examples).encode())

    console = open_console()
    show_sources(console, cache.summary["sources"])
    show_splits(console, cache.summary["splits"])
    for example in {(each.source, each.language): each for each in reversed(examples)}.values():
        show_example(console, example.source, example.tokens, example.spans)
    console.print(
        f"cache     {cache.folder}\nsummary   {cache.folder / 'summary.json'}\nexamples  {page}", soft_wrap=True
    )


def show_sources(console: Any, sources: dict[str, dict[str, Any]]) -> None:
    """What was read, lost and kept: a column for each source, a row for each count and reason."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    columns = []
    for name, found in sources.items():
        table.add_column(name, justify="right")
        columns.append(dict(count_lines(found)))
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(label, *(f"{column[label]:,}" if label in column else "" for column in columns))
    console.print(table)
    for name, found in sources.items():
        if found["unused_fields"]:
            fields = ", ".join(f"{field} ({rows:,} rows)" for field, rows in found["unused_fields"].items())
            console.print(f"{name}: fields that nothing is made of: {fields}.", markup=False)
        if found["own_split_set_aside"]:
            console.print(f"{name}: its val and test repeat its train, so they are set aside and a hash decides.")
    console.print()


def count_lines(found: dict[str, Any]) -> list[tuple[str, float]]:
    """A source's counts under their labels, each reason below its sum."""
    lines: list[tuple[str, float]] = [("read", found["read"])]
    for key in ("rejected", "dropped"):
        lines.append((key, sum(found[key].values())))
        lines += [(f"  {reason}", number) for reason, number in found[key].items()]
    lines += [("duplicates", found["duplicates"]), ("near duplicates", found["near_duplicates"])]
    lines += found["left_out"].items()
    lines += [(f"kept for {split}", number) for split, number in found["kept"].items()]
    lines += [(key.replace("_", " "), found[key]) for key in ("characters", "tokens", "label_tokens", "longest")]
    if found["tokens_per_chinese_character"] is not None:
        lines.append(("tokens per Chinese character", found["tokens_per_chinese_character"]))
    lines += [*found["changed"].items(), ("chunks", found["chunks"]), *found["cut"].items()]
    return lines


def show_splits(console: Any, splits: dict[str, Any]) -> None:
    """How many packs each split has and how full they are."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("split", "chunks", "tokens", "label tokens", "packs", "fill"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, found in splits.items():
        numbers = [f"{found[key]:,}" for key in ("chunks", "tokens", "label_tokens", "packs")]
        table.add_row(split, *numbers, f"{found['fill']:.2%}")
    console.print(table)
    console.print()


def show_example(console: Any, source: str, tokens: int, spans: list[tuple[bool, str]]) -> None:
    """The beginning of one document, trained words green, context dim."""
    from rich.text import Text

    text = Text()
    for trained, words in spans:
        shown = escape_controls(words[: max(0, SHOWN_CHARACTERS - len(text))])
        text.append(shown, style="green" if trained else "dim")
    if sum(len(words) for _, words in spans) > SHOWN_CHARACTERS:
        text.append(" …", style="dim")
    console.rule(f"{source}, {tokens} tokens; green is trained", align="left")
    console.print(text)
    console.print()


def main() -> None:
    """The verb `prepare`."""
    with stop_on_signals():
        run_program("config", RunConfig, prepare)


if __name__ == "__main__":
    main()
