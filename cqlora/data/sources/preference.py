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
from cqlora.data.sources.fields import UNUSED, count_unused, kind_of, optional_text, text_field
from cqlora.data.sources.sharegpt import read_turns
from cqlora.data.sources.turns import close_conversation, drop_leading_answers, put_system

CHOSEN_ALONE = "pairs of which the chosen reply alone trains"
_PROMPT_FIELDS = ("conversations", "prompt", "question", "instruction")


def parse_preference(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """The prompt with the chosen reply, and a count that says what became of the pair.

    Raises:
        RowError: a pair that lacks one of its replies, or whose prompt is of an unknown shape.
    """
    if not isinstance(row, dict):
        raise RowError(f"row is {kind_of(row)}, not an object")
    if not row.get("rejected"):
        raise RowError("missing field rejected")
    turns = pair_turns(read_prompt(row, counts), read_reply(row.get("chosen"), counts), counts)
    counts[CHOSEN_ALONE] += 1
    count_unused(row, ("chosen", "rejected", *_PROMPT_FIELDS, *QUESTION_FIELDS), counts)
    yield close_conversation(drop_leading_answers(turns, counts), counts)


def pair_turns(prompt: list[Turn], chosen: list[Turn], counts: Counter[str]) -> list[Turn]:
    """The whole conversation: the prompt and the reply, or chosen messages that begin with the prompt.

    A system message of the prompt stands; another one of the chosen messages is counted as not used.

    Raises:
        RowError: the prompt is no question, or the chosen messages are neither.
    """
    asked = [turn for turn in prompt if turn.role != "system"]
    said = [turn for turn in chosen if turn.role != "system"]
    of_reply = [turn for turn in chosen if turn.role == "system"]
    if asked != prompt and of_reply and of_reply != prompt[: len(prompt) - len(asked)]:
        counts[f"{UNUSED}chosen system"] += 1
    if asked and asked[-1].role != "user":
        raise RowError("the prompt does not end with a question")
    if not asked and len(said) == 1:
        raise RowError("missing field prompt")
    if not asked:
        return [*prompt, *chosen] if said == chosen else chosen
    if len(said) == 1 and said[0].role == "assistant":
        return [*(of_reply if asked == prompt else []), *prompt, *said]
    if said[: len(asked)] != asked:
        raise RowError("field chosen neither is a reply nor begins with the prompt")
    return [*prompt, *said[len(asked) :]] if asked != prompt else chosen


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
    """The turns before the reply, from the field that holds them; the system message alone where none does.

    Raises:
        RowError: fields hold them that do not go together.
    """
    given = [name for name in _PROMPT_FIELDS if row.get(name)]
    field = given[0] if given else ""
    text = isinstance(row.get(field), str)
    beside = ("input", "history") if field == "instruction" else ("history",) if text else ()
    given += [name for name in ("input", "history") if row.get(name) and name not in beside]
    if given not in ([], [field]):
        raise RowError(f"the prompt cannot be in the fields {' and '.join(given)} at once")
    if not field:
        return put_system(optional_text(row, "system"), [], counts)
    if not text:
        return put_system(optional_text(row, "system"), read_turns(row[field], field, counts), counts)
    asked = join_input(row) if field == "instruction" else text_field(row, field).strip()
    return [*earlier_turns(row, counts), Turn("user", asked)]
