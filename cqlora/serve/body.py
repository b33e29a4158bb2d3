"""A request's body, from bytes to fields: bounded before it is parsed, so that no body costs more than its length."""

import json
from typing import TypeVar

from pydantic import ValidationError

from cqlora.serve.failure import Failure
from cqlora.serve.requests import Request, explain

MOST_VALUES = 50_000
"""Commas and brackets of a body, those in texts not counted: parsing and checking 50,000 takes a tenth of a second."""
DEEPEST = 32
"""Brackets in brackets."""
MOST_BYTES = 4 << 20
_LEAST_BYTES = 64 << 10
_BYTES_PER_POSITION = 64
"""More than ten Chinese characters that are escaped as \\uXXXX; the longest words of vocabularies are shorter."""

Kind = TypeVar("Kind", bound=Request)


def body_limit(max_length: int) -> int:
    """Bytes that a body may have where the model holds `max_length` positions."""
    return min(MOST_BYTES, _LEAST_BYTES + _BYTES_PER_POSITION * max_length)


def parse(body: bytes, kind: type[Kind]) -> Kind:
    """The request in a body of JSON.

    Raises:
        Failure: 400, and what is wrong with it.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(400, "the body cannot be read; send JSON in UTF-8.", "invalid_json") from error
    check_structure(body)
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise Failure(400, f"the body is not JSON: {error.msg}.", "invalid_json") from error
    except ValueError as error:
        raise Failure(400, "the body holds a number of thousands of digits; send another.", "invalid_json") from error
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise explain(list(error.errors(include_url=False))) from error  # type: ignore[arg-type]


def check_structure(body: bytes) -> None:
    """Whether a body has few enough values, in a time that grows with its length alone.

    Up to the first character that makes it no JSON, where parsing ends too, it sees the strings that a parser sees.

    Raises:
        Failure: it has too many, or they are nested too deep.
    """
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Twice as many quotes as strings, and each value may have a name.
    if plain.count(b'"') > 4 * MOST_VALUES:
        raise _too_many()
    outside = b"".join(plain.split(b'"')[::2])
    brackets = outside.translate(None, _ALL_BUT_BRACKETS)
    if outside.count(b",") + len(brackets) > MOST_VALUES:
        raise _too_many()
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > DEEPEST:
            raise Failure(400, f"the body is nested deeper than {DEEPEST} levels; send a flatter one.", "invalid_json")


_ALL_BUT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


def _too_many() -> Failure:
    return Failure(400, f"the body holds more than {MOST_VALUES} values; send fewer.", "too_many_values")
