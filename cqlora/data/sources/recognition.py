"""Which kind of source a row is of, by the fields that it has: what kind=auto goes by."""

from typing import Any

from cqlora.config.choices import SourceKind
from cqlora.data.records import RowError
from cqlora.data.sources.fields import kind_of

_FIELDS: list[tuple[tuple[str, ...], SourceKind]] = [
    (("chosen", "rejected"), SourceKind.preference),
    (("messages",), SourceKind.messages),
    (("conversations",), SourceKind.sharegpt),
    (("instruction", "output"), SourceKind.alpaca),
    (("instruction", "instances"), SourceKind.belle),
    (("input", "target"), SourceKind.belle),
    (("title", "text"), SourceKind.wiki),
    (("wikitext",), SourceKind.wiki),
]
"""Fields that a row must have together, and what they make of it; the first that fits counts."""

_OASST_FIELDS = ("message_tree_id", "message_id")


def name_kind(row: Any) -> SourceKind:
    """The kind whose reader takes the row.

    Raises:
        RowError: no kind has these fields, or those of a row alone do not say enough.
    """
    if isinstance(row, list):
        return SourceKind.dialog
    if not isinstance(row, dict):
        raise RowError(f"row is {kind_of(row)}, not an object")
    if any(name in row for name in _OASST_FIELDS):
        raise RowError("rows of oasst1 are read together; set kind=oasst1")
    for names, kind in _FIELDS:
        if all(name in row for name in names):
            return kind
    if "role" in row and ("text" in row or "content" in row):
        raise RowError("a message by itself; set kind=dialog for rows that are lists of them")
    if "text" in row:
        return SourceKind.text
    raise RowError("no kind of source has these fields; set kind= by name")
