"""Preference pairs, taken as instruction tuning on the chosen reply.

Rows `{prompt, chosen, rejected}` as TRL documents them (replies as text, or as messages that may repeat the prompt),
and LLaMA-Factory's ranking format: Alpaca's or ShareGPT's row with `chosen` and `rejected` in place of its reply.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from cqlora.config.schema import SourceConfig
from cqlora.data.records import Record, RowError, Turn
from cqlora.data.sources.alpaca import QUESTION_FIELDS, earlier_turns, join_input
from cqlora.data.sources.fields import count_unused, kind_of, optional_text, text_field
from cqlora.data.sources.sharegpt import read_turns
from cqlora.data.sources.turns import close_conversation, drop_leading_answers, put_system

CHOSEN_ALONE = "pairs of which the chosen reply alone trains"
_PROMPT_FIELDS = ("prompt", "question")


def parse_preference(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """The prompt with the chosen reply, and a count that says what became of the pair.

    Raises:
        RowError: a pair that lacks one of its replies, or whose prompt is of an unknown shape.
    """
    if not isinstance(row, dict):
        raise RowError(f"row is {kind_of(row)}, not an object")
    if not row.get("rejected"):
        raise RowError("missing field rejected")
    chosen = read_reply(row.get("chosen"), counts)
    counts[CHOSEN_ALONE] += 1
    if chosen[0].role == "assistant":
        turns = [*read_prompt(row, counts), *chosen]
    else:
        # Messages that begin before the reply repeat the prompt.
        turns = put_system(optional_text(row, "system"), chosen, counts)
    count_unused(row, ("chosen", "rejected", "conversations", *_PROMPT_FIELDS, *QUESTION_FIELDS), counts)
    yield close_conversation(drop_leading_answers(turns, counts), counts)


def read_reply(chosen: Any, counts: Counter[str]) -> list[Turn]:
    """The turns of a chosen reply: one of the assistant's where it is text, else those of its messages.

    Raises:
        RowError: there is none.
    """
    if isinstance(chosen, str) and chosen.strip():
        return [Turn("assistant", chosen.strip())]
    turns = read_turns([chosen] if isinstance(chosen, dict) else chosen, "chosen", counts)
    if not turns:
        raise RowError("field chosen is empty")
    return turns


def read_prompt(row: dict[str, Any], counts: Counter[str]) -> list[Turn]:
    """The turns before the reply, from whichever fields hold them.

    Raises:
        RowError: none does.
    """
    field = next((name for name in ("conversations", *_PROMPT_FIELDS) if row.get(name)), "")
    if not field:
        return [*earlier_turns(row, counts), Turn("user", join_input(row))]
    if isinstance(row[field], str):
        return [*earlier_turns(row, counts), Turn("user", text_field(row, field).strip())]
    return put_system(optional_text(row, "system"), read_turns(row[field], field, counts), counts)
