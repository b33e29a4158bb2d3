"""What is wrong with a composition, in one sentence: the key, the value, what was expected, the nearest name."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from cqlora.errors import ConfigError


def to_schema(composed: DictConfig, schema: type) -> Any:
    """The typed configuration of a composition; the last point at which OmegaConf is seen.

    Raises:
        ConfigError: a key that no schema has, a value that is missing, or fields that contradict.
    """
    for key, known in _unknown_keys(composed):
        raise ConfigError(_name_unknown_key(key, known, schema))
    try:
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_composition(error, schema, [])) from error


def explain_composition(error: Exception, schema: type, arguments: list[str]) -> str:
    """The sentence for an exception that Hydra or OmegaConf raised while composing `arguments`."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _name_unknown_choice(str(error.missing_cfg_file), list(error.options))
    if isinstance(error, OverrideParseException):
        return f"`{error.override}` is not of the form key=value; quote values that hold brackets or commas."
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        known = _field_names(cause.object_type) if cause.object_type else []
        return _name_unknown_key(str(cause.full_key), known, schema)
    if isinstance(cause, ValidationError) and cause.full_key:
        return _name_wrong_type(cause, arguments)
    if isinstance(cause, MissingMandatoryValue) and cause.full_key:
        return f"{cause.full_key} has no value; add {cause.full_key}=VALUE."
    if isinstance(cause, InterpolationResolutionError):
        return f"{cause.full_key}: {_first_line(cause)}."
    missing_group = re.match(r"You must specify '(\w+)'.*\n(?:Available options:)?((?:\n\t\S+)*)", str(error))
    if missing_group:
        group, options = missing_group[1], missing_group[2].split()
        return f"{group} has no default; add {group}={' or '.join([f'{o}' for o in options])}."
    return _first_line(error)


def _name_unknown_choice(missing: str, options: list[str]) -> str:
    group, _, choice = missing.rpartition("/")
    if group == "hydra/launcher" and choice.startswith("submitit"):
        return "hardware=slurm_… needs hydra-submitit-launcher, which is not installed; pip install 'cqlora[slurm]'."
    near = get_close_matches(choice, options, n=1)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    return f"{group}={choice} does not exist; {hint}Choices: {', '.join(options)}."


def _name_unknown_key(key: str, known: list[str], schema: type) -> str:
    parent, _, leaf = key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    near = get_close_matches(leaf, known, n=1)
    if near:
        return f"{key} is not a key; did you mean {prefix}{near[0]}?"
    everywhere = sorted(set(_dotted_keys(schema)))
    if key in everywhere:
        return f"{key} is not a key of this choice of {parent}; choose the {parent} that has it."
    elsewhere = [name for name in everywhere if name.rpartition(".")[2] == leaf]
    near = elsewhere or get_close_matches(key, everywhere, n=1, cutoff=0.8)
    if near and near[0] != parent:
        return f"{key} is not a key; did you mean {near[0]}?"
    return f"{key} is not a key; {parent or 'the configuration'} has {', '.join(known)}."


def _name_wrong_type(error: ValidationError, arguments: list[str]) -> str:
    key = str(error.full_key)
    typed = [a.partition("=")[2] for a in arguments if a.lstrip("+").partition("=")[0] == key]
    received = f"{key}={typed[-1]}" if typed else key
    reason = _first_line(error)
    expected = re.search(r"could not be converted to (\w+)", reason)
    if expected:
        return f"{received} is not of type {expected[1].lower()}; give {key} a value of that type."
    choices = re.search(r"expected one of \[(.*)\]", reason)
    if choices:
        value = typed[-1] if typed else str(getattr(error, "value", ""))
        near = get_close_matches(value, choices[1].split(", "), n=1)
        hint = f"did you mean {key}={near[0]}? " if near else ""
        return f"{received} is not a choice; {hint}Choices: {choices[1]}."
    if "is not a subclass of SourceConfig" in reason:
        return f"source {key} cannot be added on the command line; write a file configs/data/NAME.yaml (docs/data.md)."
    return f"{received}: {reason}."


def _unknown_keys(node: DictConfig, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every key that `+` appended to a typed node, with the names that the node does have."""
    kind = OmegaConf.get_type(node)
    known = _field_names(kind)
    for key in node:
        full_key = f"{path}{key!s}"
        if known and key not in known:
            yield full_key, known
        elif not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, str(key)):
            child = node[key]
            if isinstance(child, DictConfig) and not child._is_none():
                yield from _unknown_keys(child, f"{full_key}.")


def _field_names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _dotted_keys(schema: type, path: str = "") -> Iterator[str]:
    """Every key of a schema and of its variants, as a user types it."""
    for kind in (schema, *schema.__subclasses__()):
        hints = typing.get_type_hints(kind)
        for name in _field_names(kind):
            yield path + name
            if dataclasses.is_dataclass(hints[name]) and isinstance(hints[name], type):
                yield from _dotted_keys(hints[name], f"{path}{name}.")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
