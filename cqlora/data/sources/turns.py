"""Rules that repair a list of turns into a conversation to train on; each use is counted."""

from collections import Counter

from cqlora.data.records import Conversation, RowError, Turn
from cqlora.data.sources.fields import UNUSED


def close_conversation(turns: list[Turn], counts: Counter[str], tools: str = "") -> Conversation:
    """End on an assistant's turn: what a user said after it has no answer to learn.

    Raises:
        RowError: no turns, or none of the assistant.
    """
    if not turns:
        raise RowError("empty conversation")
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if last < 0:
        raise RowError("no assistant turn")
    if last + 1 < len(turns):
        counts["trailing turns without an answer cut"] += 1
    return Conversation(turns[: last + 1], tools=tools)


def put_system(system: str, turns: list[Turn], counts: Counter[str]) -> list[Turn]:
    """The turns after the system message that a row has in a field of its own.

    Turns that bring one keep theirs; another one in the field is counted as not used.
    """
    if not system or (turns and turns[0].role == "system"):
        if system and turns[0].text.strip() != system:
            counts[f"{UNUSED}system"] += 1
        return turns
    return [Turn("system", system), *turns]


def drop_leading_answers(turns: list[Turn], counts: Counter[str]) -> list[Turn]:
    """Begin with a user's turn (after a system message): an answer to nothing teaches nothing."""
    system = turns[:1] if turns and turns[0].role == "system" else []
    rest = turns[len(system) :]
    asked = next((index for index, turn in enumerate(rest) if turn.role == "user"), len(rest))
    if asked:
        counts["leading answers without a question cut"] += 1
    return system + rest[asked:]


def join_repeated_roles(turns: list[Turn], counts: Counter[str]) -> list[Turn]:
    """Turns that follow one of the same role become part of it, after an empty line; results of tools stay apart."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1].role == turn.role != "tool" and not joined[-1].calls:
            said = "\n\n".join(text for text in (joined[-1].text, turn.text) if text)
            joined[-1] = Turn(turn.role, said, turn.calls)
        else:
            joined.append(turn)
    if len(joined) < len(turns):
        counts["repeated roles joined"] += 1
    return joined
