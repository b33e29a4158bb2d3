"""Checks of any schema's fields; each error is one sentence that names the key as a user types it."""

import dataclasses
import math
import os
from typing import Any

from cqlora.errors import ConfigError


def check_fields(config: Any, paths: tuple[str, ...] = (), filled: tuple[str, ...] = ()) -> None:
    """Check what holds for every field of a schema, and expand `~` in those that are paths.

    Raises:
        ConfigError: a number that is not finite or has more than 63 bits, a text that no file or log takes, a path
            that no system takes, or an empty text where one of `filled` is meant.
    """
    for name in (each.name for each in dataclasses.fields(config)):
        value, key = getattr(config, name), dotted(config, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value} is no finite number; give one.")
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise ConfigError(f"{key} has more than 63 bits; give a smaller number.")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                check_text(key, text)
        if name == "name" and value is not None and len(value) > 128:
            raise ConfigError(f"{key} has {len(value)} characters; give a name of at most 128.")
        if name in filled and not value.strip():
            raise ConfigError(f"{key} is empty; give it a value, or leave it out for its default.")
        if name in paths:
            expanded = [os.path.expanduser(path) for path in value] if isinstance(value, list) else value
            setattr(config, name, expanded if isinstance(value, list) else os.path.expanduser(value))
            for path in [value] if isinstance(value, str) else value:
                check_path(key, path)


def check_text(key: str, text: str) -> None:
    """Raise ConfigError for a text that cannot be written down."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{key} holds a zero byte or half a character, which no file takes; leave it out.")


def check_path(key: str, path: str) -> None:
    """Raise ConfigError for a path that is longer than systems allow."""
    longest = max((len(os.fsencode(part)) for part in path.split("/")), default=0)
    if longest > 255 or len(os.fsencode(path)) > 4095:
        raise ConfigError(f"{key} is longer than a file's name may be (255 bytes a part, 4,095 in all); shorten it.")


def require_used(config: Any, key: str, used: bool, needed: str) -> None:
    """Raise ConfigError for a value that differs from its default and would have no effect without what is needed."""
    if used:
        return
    declared = next(each for each in dataclasses.fields(config) if each.name == key)
    made = declared.default_factory
    default = made() if made is not dataclasses.MISSING else declared.default
    value = getattr(config, key)
    if value != default:
        shown = getattr(value, "name", value)
        raise ConfigError(
            f"{dotted(config, key)}={shown} has no effect without {needed}; leave it out, or use {needed}."
        )


def require_positive(config: Any, *keys: str) -> None:
    """Raise ConfigError for the first of `keys` whose value is not above zero."""
    for key in keys:
        value = getattr(config, key)
        if not value > 0:
            raise ConfigError(f"{dotted(config, key)}={value} must be above 0.")


def require_range(key: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        wanted = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ConfigError(f"{key}={value} is out of range; use a value {wanted}.")


def require_divides(config: Any, node: str, divisor: str, number: str) -> None:
    """Raise ConfigError unless the field `divisor` divides the field `number`."""
    if getattr(config, number) % getattr(config, divisor):
        raise ConfigError(
            f"{node}.{number}={getattr(config, number)} is not divisible by {node}.{divisor}="
            f"{getattr(config, divisor)}."
        )


def dotted(config: Any, key: str) -> str:
    """A field's whole key, as a user types it."""
    node = node_name(config)
    return f"{node}.{key}" if node else key


def node_name(config: Any) -> str:
    """Where a schema sits in the composed tree, as a user types it."""
    names = {"SourceConfig": "data.sources.NAME", "CleanConfig": "data.clean", "PretrainConfig": "stage"}
    names |= dict.fromkeys(_WHOLE_PROGRAMS, "")
    kind = type(config).__name__
    return names.get(kind, kind.removesuffix("Config").lower().replace("sft", "stage"))


_WHOLE_PROGRAMS = tuple(
    f"{verb}Config"
    for verb in (
        "Run",
        "Plan",
        "Chat",
        "Serve",
        "Engine",
        "Merge",
        "Convert",
        "Extend",
        "Fetch",
        "Push",
        "Generate",
        "Evaluate",
    )
)
"""Schemas whose keys stand at the top of a command line."""
