"""Open-Assistant conversations: message trees, or message rows that make up trees, to conversations."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cqlora.config.choices import OasstPaths
from cqlora.config.schema import SourceConfig
from cqlora.data.records import Conversation, RawRow, Record, RowDropped, RowError, Turn
from cqlora.data.sources.fields import count_unused, kind_of, turn_of
from cqlora.data.sources.turns import close_conversation

_ROLES = {"prompter": "user", "assistant": "assistant"}

_USED = (
    "message_id",
    "parent_id",
    "message_tree_id",
    "text",
    "role",
    "lang",
    "rank",
    "deleted",
    "review_result",
    "replies",
)
_DEEPEST = 1000
"""Messages from a prompt down, beyond which a tree is none."""

Message = dict[str, Any]


def parse_oasst1(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """The conversations of one tree, each ending on an assistant's turn.

    Raises:
        RowError: no tree can be made of the row.
        RowDropped: the prompt is not to be used, or nobody answered it.
    """
    root = tree_of(row, counts)
    unwanted = why_unwanted(root, source)
    if unwanted:
        raise RowDropped(f"prompt {unwanted}")
    count_unused(root, _USED, counts)
    seen: set[tuple[Turn, ...]] = set()
    for path in walk_paths(root, source, counts):
        turns = [turn_of(message, "role", ("text",), _ROLES) for message in path]
        conversation = trim_path(turns, counts)
        if conversation is not None and tuple(conversation.turns) not in seen:
            seen.add(tuple(conversation.turns))
            yield Conversation(conversation.turns, family=turns[0].text)
    if not seen:
        raise RowDropped("prompt without an answer")


def tree_of(row: Any, counts: Counter[str]) -> Message:
    """The root message, its replies nested.

    Raises:
        RowError: no tree can be made of the row.
    """
    if isinstance(row, dict) and isinstance(row.get("prompt"), dict):
        prompt: Message = row["prompt"]
        return prompt
    messages = row if isinstance(row, list) else [row]
    if not messages:
        raise RowError("no prompt in the tree")
    for message in messages:
        if not isinstance(message, dict):
            raise RowError(f"row is {kind_of(message)}, not an object")
        if not isinstance(message.get("message_id"), str):
            raise RowError("missing field message_id")
        if not isinstance(message.get("parent_id"), str | None):
            raise RowError("field parent_id is not text")
    by_id = {message["message_id"]: {**message, "replies": []} for message in messages}
    if len(by_id) < len(messages):
        counts["messages of a repeated id left out"] += len(messages) - len(by_id)
    roots = [message for message in by_id.values() if message.get("parent_id") is None]
    if not roots:
        raise RowError("no prompt in the tree")
    if len(roots) > 1:
        counts["further prompts of a tree left out"] += len(roots) - 1
    for message in by_id.values():
        parent = message.get("parent_id")
        if parent in by_id:
            by_id[parent]["replies"].append(message)
        elif parent is not None:
            counts["messages without their parent left out"] += 1
    return roots[0]


def usable_replies(messages: list[Message], source: SourceConfig, counts: Counter[str]) -> list[Message]:
    """The replies that are not deleted, did not fail review, and are in a wanted language."""
    if not isinstance(messages, list):
        raise RowError(f"field replies is {kind_of(messages)}, not a list")
    usable = []
    for message in messages:
        if not isinstance(message, dict):
            raise RowError(f"message is {kind_of(message)}, not an object")
        unwanted = why_unwanted(message, source)
        if unwanted:
            counts[f"replies {unwanted} left out"] += 1
        else:
            usable.append(message)
    return usable


def why_unwanted(message: Message, source: SourceConfig) -> str:
    """Why a message is not to be used; empty where it is."""
    if message.get("deleted"):
        return "deleted"
    if message.get("review_result") is False:
        return "that failed review"
    return "in another language" if source.langs and message.get("lang") not in source.langs else ""


def walk_paths(root: Message, source: SourceConfig, counts: Counter[str]) -> Iterator[list[Message]]:
    """Paths from the prompt down: the best ranked, all, or one drawn by the messages' own ids."""
    waiting = [[root]]
    while waiting:
        path = waiting.pop()
        if len(path) > _DEEPEST:
            raise RowError(f"tree deeper than {_DEEPEST} messages")
        replies = usable_replies(path[-1].get("replies") or [], source, counts)
        if not replies:
            yield path
            continue
        if source.oasst_paths is OasstPaths.best:
            replies = [min(replies, key=rank_of)]
        elif source.oasst_paths is OasstPaths.sampled:
            replies = [min(replies, key=draw_of)]
        waiting.extend([*path, reply] for reply in reversed(replies))


def rank_of(message: Message) -> float:
    """0 is best; a message without a rank comes after all that have one."""
    rank = message.get("rank")
    try:
        return float(rank) if isinstance(rank, int | float) and rank == rank else math.inf
    except OverflowError:
        raise RowError("field rank is out of range") from None


def draw_of(message: Message) -> str:
    """A hash of the message's id: as good as chance, and the same every time."""
    return hashlib.sha256(
        str(message.get("message_id", message.get("text"))).encode("utf-8", "surrogatepass")
    ).hexdigest()


def trim_path(turns: list[Turn], counts: Counter[str]) -> Conversation | None:
    """The path up to its last answer; None where nobody answered."""
    if not any(turn.role == "assistant" for turn in turns):
        return None
    return close_conversation(turns, counts)


def group_messages(rows: Iterator[RawRow]) -> Iterator[RawRow]:
    """Rows of single messages joined to one row a tree; whole trees and broken rows pass as they are.

    The published files hold a tree's messages one after another. Ids tell where the next one begins.
    """
    group: list[RawRow] = []
    for row in rows:
        message = decode_message(row.body)
        if message is None:
            yield row
            continue
        row = row._replace(body=message)
        if group and begins_tree(message, group[0].body):
            yield join_group(group)
            group = []
        group.append(row)
    if group:
        yield join_group(group)


def begins_tree(message: Message, before: Message) -> bool:
    """Whether a message belongs to another tree than the one before; without ids of trees, each prompt begins one."""
    tree = message.get("message_tree_id")
    return tree != before.get("message_tree_id") or (tree is None and message.get("parent_id") is None)


def decode_message(body: Any) -> Message | None:
    """The single message that a row holds; None for anything else."""
    if isinstance(body, bytes):
        if b'"prompt"' in body and b'"replies"' in body:
            return None
        try:
            body = json.loads(body)
        except (ValueError, RecursionError):
            return None
    is_message = isinstance(body, dict) and "message_id" in body and "prompt" not in body
    return body if is_message else None


def join_group(group: list[RawRow]) -> RawRow:
    """One row of all messages, at the place of the first."""
    return group[0]._replace(body=[row.body for row in group])
