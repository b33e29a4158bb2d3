"""An exchange too long for a sequence, made to fit: the question loses its beginning before the reply loses its end."""

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

from cqlora.data.chat import ChatEncoder, EncodedTurn

CONTEXT_SHARE = 4
"""One part in so many: what a long context keeps of the room, and a long question of what the context keeps."""


def shorten_exchange(
    chat: ChatEncoder, turns: Sequence[EncodedTurn], room: int, counts: Counter[str]
) -> list[EncodedTurn]:
    """A system message, questions and replies, in this order, in at most `room` tokens.

    The reply is kept whole as long as a quarter of the room, or all of the context where that is less, is left
    before it; beyond that it ends early, without its end token. Of the context the last words stay, since the reply
    answers those, and the system message where it leaves the question its part. Nothing is left where not even
    the last word of the question fits: a reply to nothing teaches nothing.
    """
    context = list(takewhile(lambda turn: turn.turn.role != "assistant", turns))
    replies = list(turns[len(context) :])
    system = context[:1] if context and context[0].turn.role == "system" else []
    questions = context[len(system) :]
    replied = min(tokens_of(replies), room - min(tokens_of(context), room // CONTEXT_SHARE))
    left = room - replied
    if system and tokens_of(system) > left - min(tokens_of(questions), left // CONTEXT_SHARE):
        counts["system messages too long left out"] += 1
        system = []
    kept = keep_end(chat, questions, left - tokens_of(system))
    if questions and not kept:
        counts["exchanges too long left out"] += 1
        return []
    if tokens_of(kept) < tokens_of(questions):
        counts["questions cut at their beginning"] += 1
    if replied < tokens_of(replies):
        counts["replies cut at their end"] += 1
        replies = keep_beginning(chat, replies, replied)
    return [*system, *kept, *replies]


def tokens_of(turns: Sequence[EncodedTurn]) -> int:
    """Tokens of turns together."""
    return sum(len(turn.ids) for turn in turns)


def keep_end(chat: ChatEncoder, turns: list[EncodedTurn], room: int) -> list[EncodedTurn]:
    """The last turns that fit, and the end of the one before them."""
    kept: list[EncodedTurn] = []
    for turn in reversed(turns):
        if len(turn.ids) > room:
            shorter = cut_beginning(chat, turn, room)
            return [shorter, *kept] if shorter else kept
        kept.insert(0, turn)
        room -= len(turn.ids)
    return kept


def keep_beginning(chat: ChatEncoder, turns: list[EncodedTurn], room: int) -> list[EncodedTurn]:
    """The first turns that fit, and the beginning of the one after them."""
    kept: list[EncodedTurn] = []
    for turn in turns:
        if room > 0:
            kept.append(turn if len(turn.ids) <= room else cut_end(chat, turn, room))
        room -= len(turn.ids)
    return kept


def cut_beginning(chat: ChatEncoder, turn: EncodedTurn, room: int) -> EncodedTurn | None:
    """The turn's header and its last words in `room` tokens; None where not one word fits. No token is a label."""
    role = f"{turn.turn.role}\n"
    header = chat.segment.encode(role, add_special_tokens=False).ids
    opening, ending = [chat.start, *header], [chat.end, *chat.newline]
    words = turn.ids[1 : len(turn.ids) - len(ending)]
    offsets = chat.segment.encode(f"{role}{turn.turn.text.strip()}", add_special_tokens=False).offsets
    first = max(len(words) - (room - len(opening) - len(ending)), 1)
    # Not among the header's own tokens, nor in the middle of a character of several tokens.
    while first < len(words) and (offsets[first][0] < len(role) or offsets[first][0] < offsets[first - 1][1]):
        first += 1
    if first >= len(words):
        return None
    ids = [*opening, *words[first:], *ending]
    return EncodedTurn(turn.turn, ids, bytes(len(ids)), 0, 0)


def cut_end(chat: ChatEncoder, turn: EncodedTurn, room: int) -> EncodedTurn:
    """The turn's first `room` tokens."""
    characters, utf8_bytes = chat.count_characters(turn)
    covered = [index for index, label in enumerate(turn.labels[:room]) if label]
    return EncodedTurn(
        turn.turn,
        turn.ids[:room],
        turn.labels[:room],
        sum(characters[index] for index in covered),
        sum(utf8_bytes[index] for index in covered),
    )
