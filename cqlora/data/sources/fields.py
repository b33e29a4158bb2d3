"""Fields of rows, read or refused with a reason, and a count of those that no reader uses."""

import html
from collections import Counter
from typing import Any

from cqlora.data.records import ROLES, RowError, Turn


def text_field(row: Any, *names: str) -> str:
    """The first of the named fields that the row has.

    Raises:
        RowError: the row is no object, lacks the field, or holds something else than words in it.
    """
    if not isinstance(row, dict):
        raise RowError(f"row is {kind_of(row)}, not an object")
    for name in names:
        if name in row:
            value = row[name]
            if not isinstance(value, str):
                raise RowError(f"field {name} is {kind_of(value)}, not text")
            if not value.strip():
                raise RowError(f"field {name} is empty")
            return value
    raise RowError(f"missing field {' or '.join(names)}")


def turn_of(message: Any, role_field: str, text_fields: tuple[str, ...], roles: dict[str, str]) -> Turn:
    """One message, its role translated to system, user or assistant.

    Raises:
        RowError: a missing field or an unknown role.
    """
    text = text_field(message, *text_fields)
    role = message.get(role_field)
    if not isinstance(role, str):
        raise RowError(f"missing field {role_field}")
    known = roles.get(role.strip().lower())
    if known is None:
        raise RowError(f"unknown role {role[:30]}")
    return Turn(known, text.strip())


UNUSED = "field not used: "
"""Before a field's name, in the count of rows in which it held something that no reader uses."""


def count_unused(row: dict[str, Any], used: tuple[str, ...], counts: Counter[str]) -> None:
    """Count the fields of a row that hold something and that are none of `used`."""
    for name, value in row.items():
        if name not in used and value not in (None, "", [], {}):
            counts[f"{UNUSED}{printable(name[:60])}"] += 1


def count_unused_of_messages(messages: list[Any], used: tuple[str, ...], counts: Counter[str]) -> None:
    """As count_unused, for the fields of a row's messages: a row counts once however many messages have the field."""
    of_row: Counter[str] = Counter()
    for message in messages:
        if isinstance(message, dict):
            count_unused(message, used, of_row)
    counts.update(f"{UNUSED}message {name.removeprefix(UNUSED)}" for name in of_row)


def printable(text: str) -> str:
    """Text that any file can hold: what UTF-8 cannot, such as half a surrogate pair, by its number."""
    return text.encode("utf-8", "backslashreplace").decode()


def optional_text(row: dict[str, Any], name: str) -> str:
    """The words of a field that a row may lack, or leave empty.

    Raises:
        RowError: something else than words is in it.
    """
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(f"field {name} is {kind_of(value)}, not text")
    return (value or "").strip()


def unescape(text: str) -> str:
    """Text with its HTML entities resolved.

    Raises:
        RowError: the number of one has thousands of digits.
    """
    try:
        return html.unescape(text)
    except ValueError:
        raise RowError("HTML entity out of range") from None


def kind_of(value: Any) -> str:
    """What JSON calls the value's type."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", bytes: "bytes"}
    return names.get(type(value), "a number")


PLAIN_ROLES = {role: role for role in ROLES}
