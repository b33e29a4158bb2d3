"""Instruction rows as Stanford Alpaca and the tools after it write them: `{instruction, input, output}`, and more.

Format as https://github.com/tatsu-lab/stanford_alpaca describes it; `system` and `history` as LLaMA-Factory adds them.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from cqlora.config.schema import SourceConfig
from cqlora.data.records import Record, RowError, Turn
from cqlora.data.sources.fields import count_unused, optional_text, text_field
from cqlora.data.sources.turns import close_conversation, put_system

QUESTION_FIELDS = ("instruction", "input", "system", "history")
"""What a row says before its reply."""


def parse_alpaca(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """The row's history, then its instruction with its input below it, and the reply; nothing in them is rewritten."""
    asked = join_input(row)
    answer = text_field(row, "output")
    count_unused(row, (*QUESTION_FIELDS, "output"), counts)
    turns = [*earlier_turns(row, counts), Turn("user", asked), Turn("assistant", answer.strip())]
    yield close_conversation(turns, counts)


def join_input(row: Any) -> str:
    """The instruction, with the input on a line of its own below it.

    Raises:
        RowError: the row is no object, or has no instruction.
    """
    instruction = text_field(row, "instruction").strip()
    given = optional_text(row, "input")
    return f"{instruction}\n{given}" if given else instruction


def earlier_turns(row: dict[str, Any], counts: Counter[str]) -> list[Turn]:
    """What stands before a row's question: its `system` message and its `history`."""
    return put_system(optional_text(row, "system"), parse_history(row.get("history")), counts)


def parse_history(history: Any) -> list[Turn]:
    """The turns of earlier exchanges, `[[question, answer], …]` as Alpaca rows have them.

    Raises:
        RowError: it is of another shape.
    """
    turns = []
    for exchange in [] if history in (None, "") else history if isinstance(history, list) else [history]:
        if not isinstance(exchange, list) or len(exchange) != 2 or not all(isinstance(text, str) for text in exchange):
            raise RowError("field history is not a list of questions with their answers")
        if not all(text.strip() for text in exchange):
            raise RowError("field history has an empty turn")
        turns += [Turn("user", exchange[0].strip()), Turn("assistant", exchange[1].strip())]
    return turns
