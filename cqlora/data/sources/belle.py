"""BELLE in all its formats, and other instruction rows such as Alpaca's, recognised by their shape.

Formats as the data sets' own cards describe them (https://github.com/LianjiaTech/BELLE, data/).
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cqlora.config.schema import SourceConfig
from cqlora.data.records import Conversation, Record, RowError, Turn
from cqlora.data.sources.alpaca import parse_history
from cqlora.data.sources.fields import UNUSED, count_unused, kind_of, optional_text, text_field
from cqlora.data.sources.sharegpt import mend_conversation
from cqlora.data.sources.turns import close_conversation, drop_leading_answers, join_repeated_roles, put_system

_SPEAKER = re.compile(r"(?:^|\n)[ \t]*(Human|Assistant)[:：][ \t]*")
_ROLE_OF = {"Human": "user", "Assistant": "assistant"}
_PLAY = re.compile(r"角色信息.{0,10}对话")
_LINE = re.compile(r"^([^\s:：][^:：\n]{0,19})[:：][ \t]*", re.MULTILINE)


def parse_belle(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """The row's conversation; a seed task gives one for each of its instances."""
    if not isinstance(row, dict):
        raise RowError(f"row is {kind_of(row)}, not an object")
    if "conversations" in row:
        yield mend_conversation(row, "conversations", counts)
    elif "instances" in row:
        yield from parse_seed_task(row, counts)
    elif "target" in row:
        count_unused(row, ("input", "target", "system", "history"), counts)
        yield parse_exchange(row, text_field(row, "input"), text_field(row, "target"), counts)
    else:
        count_unused(row, ("instruction", "input", "output", "system", "history"), counts)
        yield parse_instruction(row, counts)


def parse_seed_task(row: dict[str, Any], counts: Counter[str]) -> Iterator[Record]:
    """A seed task's instruction with each of its instances."""
    instances = row["instances"]
    if not isinstance(instances, list) or not instances:
        raise RowError("missing field instances")
    count_unused(row, ("instances", "instruction", "system", "history"), counts)
    for instance in instances:
        if not isinstance(instance, dict):
            raise RowError(f"instance is {kind_of(instance)}, not an object")
        common: dict[str, Any] = {name: row[name] for name in ("instruction", "system", "history") if name in row}
        conversation = parse_instruction({**instance, **common}, counts)
        yield Conversation(conversation.turns, family=text_field(row, "instruction"))


def parse_instruction(row: dict[str, Any], counts: Counter[str]) -> Conversation:
    """`{instruction, input, output}`: one exchange, a history of several, or a play of two characters."""
    instruction, output = text_field(row, "instruction"), text_field(row, "output")
    given = optional_text(row, "input")
    if given:
        instruction = f"{instruction.strip()}\n{given}"
    if _PLAY.search(instruction):
        play = parse_play(instruction, output, counts)
        if play is not None:
            for name in ("system", "history"):
                if row.get(name):
                    counts[f"{UNUSED}{name}"] += 1
            return play
    return parse_exchange(row, instruction, output, counts)


def parse_exchange(row: dict[str, Any], asked: str, answer: str, counts: Counter[str]) -> Conversation:
    """A question and its answer after the row's `system` message and `history` of earlier exchanges."""
    exchange = parse_pair(asked, answer, counts)
    turns = put_system(optional_text(row, "system"), [*parse_history(row.get("history")), *exchange], counts)
    return close_conversation(turns, counts)


def parse_pair(asked: str, answer: str, counts: Counter[str]) -> list[Turn]:
    """A question and its answer; `Human:` and `Assistant:` in the question make it a history of turns."""
    parts = _SPEAKER.split(asked)
    if len(parts) == 1:
        return [Turn("user", asked.strip()), Turn("assistant", answer.strip())]
    counts["histories parsed into turns"] += 1
    before = [Turn("user", parts[0].strip())] if parts[0].strip() else []
    history = [
        Turn(_ROLE_OF[speaker], text.strip())
        for speaker, text in zip(parts[1::2], parts[2::2], strict=True)
        if text.strip()
    ]
    turns = drop_leading_answers([*before, *history, Turn("assistant", answer.strip())], counts)
    return join_repeated_roles(turns, counts)


def parse_play(instruction: str, output: str, counts: Counter[str]) -> Conversation | None:
    """A dialogue of two named characters: who speaks first becomes the user, the other the assistant.

    The description of the characters is the system message. None where not two of them speak.
    """
    parts = _LINE.split(output.strip())
    speakers = list(dict.fromkeys(name.strip() for name in parts[1::2]))
    if parts[0].strip() or len(speakers) != 2:
        counts["plays not of two characters kept as answers"] += 1
        return None
    counts["plays parsed into turns"] += 1
    turns = [
        Turn("user" if name.strip() == speakers[0] else "assistant", text.strip())
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
        if text.strip()
    ]
    system = Turn("system", instruction.strip())
    return close_conversation([system, *join_repeated_roles(turns, counts)], counts)
