"""Fields of rows, taken with the reason why a row cannot be used."""

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


def kind_of(value: Any) -> str:
    """What JSON calls the value's type."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean"}
    return names.get(type(value), "a number")


PLAIN_ROLES = {role: role for role in ROLES}
