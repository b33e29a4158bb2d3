"""What is wrong with a composition, in one sentence: the key, the value, what was expected, the nearest name."""

import dataclasses
import re
import shlex
import typing
from collections.abc import Callable, Iterator
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

from cqlora.config.choices import SourceKind
from cqlora.config.foreign_names import FOREIGN_CHOICES, FOREIGN_KEYS
from cqlora.config.schema import CONFIG_DIR
from cqlora.errors import ConfigError

Place = Callable[..., str]
"""From a key, and the name of a file where it is known, to `FILE, line N: `, or to nothing."""


def no_place(key: str, config_path: str | None = None) -> str:
    """Where no file is known."""
    return ""


def to_schema(composed: DictConfig, schema: type) -> Any:
    """The typed configuration of a composition; the last point at which OmegaConf is seen.

    Raises:
        ConfigError: a key that no schema has, a value that is missing, or fields that contradict.
    """
    for key, known in _unknown_keys(composed):
        raise ConfigError(_name_unknown_key(key, known, schema, []))
    try:
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_composition(error, schema, [])) from error


def explain_composition(error: Exception, schema: type, arguments: list[str], place_of: Place = no_place) -> str:
    """The sentence for an exception that Hydra or OmegaConf raised while composing `arguments`.

    `place_of` says in which file and line a key stands that no argument has set.
    """
    cause = _first_cause(error)
    key = str(getattr(cause, "full_key", None) or "")
    if isinstance(error, OverflowError):
        named = re.search(r"full_key: (\S+)", str(error))
        return f"{named[1] if named else 'a number'} is too large to be a number; give a smaller one."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        return _name_unknown_choice(error, place_of)
    if isinstance(error, OverrideParseException):
        return f"`{error.override}` is not of the form key=value; {_quoting_hint(str(error.override))}."
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and key:
        parent = getattr(cause, "parent_node", None)
        known = _field_names(cause.object_type) or ([str(name) for name in parent or ()])
        return place_of(key) + _name_unknown_key(key, known, schema, arguments)
    if isinstance(cause, ValidationError) and key:
        return place_of(key) + _name_wrong_type(cause, arguments)
    if isinstance(cause, MissingMandatoryValue) and key:
        return _name_missing_value(key)
    if isinstance(cause, InterpolationResolutionError):
        return f"{place_of(key)}{key}: {_first_line(cause)}."
    if "Config group override must be a string" in str(error) or "Ambiguous value for argument" in str(error):
        return _name_unfit_value(error, schema, arguments)
    missing_group = re.match(r"You must specify '(\w+)'.*\n(?:Available options:)?((?:\n\t\S+)*)", str(error))
    if missing_group:
        group, options = missing_group[1], missing_group[2].split()
        return f"{group} has no default; add {group}={' or '.join(options)}."
    return _name_file_error(error, cause, schema, place_of)


def _name_file_error(error: Exception, cause: BaseException, schema: type, place_of: Place) -> str:
    """What is wrong with a file's defaults or its form, which Hydra tells in its own words."""
    sentence = re.sub(r"\b[Ii]n '[\w/.-]+'[:,]? ?", "", _whole_sentence(error) or _first_line(cause))
    within = re.search(r"\b[Ii]n '([\w/.-]+)'", str(error))
    twice = re.match(r"Multiple values for ([\w/]+)\.", sentence)
    if twice:
        return f"{twice[1]} is chosen twice; write {twice[1]}=NAME once, without a plus sign."
    stranger = re.search(r"Could not override '([\w/]+)'\. ?No match in the defaults list", sentence)
    if stranger:
        known = _field_names(schema)
        groups = sorted(folder.name for folder in CONFIG_DIR.iterdir() if folder.is_dir() and folder.name in known)
        if not groups:
            return _name_unknown_key(stranger[1], known, schema, [])
        near = get_close_matches(stranger[1], groups, n=1) or [", ".join(groups)]
        sentence = f"{stranger[1]} is no group of the defaults; did you mean {near[0]}?"
        return (place_of(stranger[1], within[1]) if within else "") + sentence
    return f"{place_of('defaults', within[1]) if within else place_of('')}{sentence}."


def _first_cause(error: BaseException) -> BaseException:
    """What OmegaConf raised, which Hydra may have made something else of."""
    found = error
    while not isinstance(found, OmegaConfBaseException):
        following = found.__cause__ or found.__context__
        if following is None:
            return error
        found = following
    return found


def _whole_sentence(error: Exception) -> str:
    """Hydra's own words on one line, without the list of places where it looked."""
    lines = [line.strip() for line in str(error).partition("\nSearch path:")[0].splitlines() if line.strip()]
    return " ".join(lines).rstrip(".")


def _quoting_hint(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if equals and key and value.count("[") == value.count("]") and value.count("{") == value.count("}"):
        return f"quote the value, once for Hydra and once for the shell: {key}=\\'…\\'"
    return "quote values that hold brackets or commas"


def _name_unfit_value(error: Exception, schema: type, arguments: list[str]) -> str:
    """A number or null where the name of a choice is meant, or several values without --multirun."""
    several = re.search(r"Ambiguous value for argument '(.*)'", str(error))
    if several:
        return _name_several_values(several[1], schema)
    for argument in arguments:
        group, _, choice = argument.lstrip("+").partition("=")
        if re.fullmatch(r"null|true|false|[\d.e+-]+", choice) and (CONFIG_DIR / group).is_dir():
            return _refuse_choice(group, choice, [])
    return f"{_whole_sentence(error)}."


def _name_several_values(told: str, schema: type) -> str:
    """One text that Hydra takes for several, or several values without --multirun."""
    key, _, values = told.partition("=")
    if dict(_typed_keys(schema)).get(key.lstrip("+")) not in (str, str | None):
        return f"{told} are several values; add --multirun to run with each, or use {key}=[{values}] for a list."
    # The program itself has put quotes around words of it.
    text = re.sub(r"'((?:[^'\\]|\\.)*)'", r"\1", values)
    whole = f"{key}='{text}'"
    typed = shlex.quote(whole) if set(whole) & set('"$`\\!') else f'"{whole}"'
    return f"{key}={text} are several values by their commas; type {typed} for one text, or add --multirun for each."


def _refuse_choice(group: str, choice: str, options: list[str]) -> str:
    if choice == "null":
        return _name_missing_value(group)
    options = options or sorted(file.stem for file in (CONFIG_DIR / group).glob("*.yaml"))
    hint = _hint_at_choice(group, choice, options)
    return f"{group}={choice} does not exist; {hint}Choices: {', '.join(options)}."


def _name_missing_value(key: str) -> str:
    if re.fullmatch(r"data\.sources\.[^.]+\.kind", key):
        return f"{key} has no value; use {' or '.join(kind.name for kind in SourceKind)}."
    if (CONFIG_DIR / key).is_dir():
        choices = sorted(file.stem for file in (CONFIG_DIR / key).glob("*.yaml"))
        return f"{key} has no value, and no run goes without; use {key}={' or '.join(choices)}."
    return f"{key} has no value; add {key}=VALUE."


def name_missing_line(key: str, choice: str) -> str:
    """What a file of one's own lacks, that is chosen by the name `choice`."""
    if key.rpartition(".")[2] == "name":
        return f"{key} has no value; add the line `name: {choice}`."
    return _name_missing_value(key)


def _name_unknown_choice(error: MissingConfigException, place_of: Place) -> str:
    missing, options = str(error.missing_cfg_file), list(error.options or [])
    parts = 2 if missing.startswith(("hydra/", "hardware/gpu/")) else 1
    group, choice = "/".join(missing.split("/")[:parts]), "/".join(missing.split("/")[parts:])
    within = re.match(r"In '(.+?)':", str(error))
    place = place_of(choice.rpartition("/")[2], within[1]) if within else ""
    if group == "hydra/launcher" and choice.startswith("submitit"):
        return "hardware=slurm_… needs hydra-submitit-launcher, which is not installed; pip install 'cqlora[slurm]'."
    if not choice:
        return f"{place_of(missing, within[1]) if within else ''}there is no file {missing}.yaml to compose."
    if within and (CONFIG_DIR / choice.split("/")[0]).is_dir() and "/" in choice:
        inner, _, name = choice.partition("/")
        return f"{place_of(name, within[1])}{missing} does not exist; did you mean `- override /{inner}: {name}`?"
    return place + _refuse_choice(group, choice, [] if group == "hardware/gpu" else options)


def _hint_at_choice(group: str, choice: str, options: list[str]) -> str:
    """What somebody meant who chose what there is not."""
    if "/" in choice or "\\" in choice or "." in choice:
        near = get_close_matches(choice.rpartition("/")[2].lower(), options, n=1)
        if group == "model":
            return f"a folder is given by its key, beside a shape: model={(near or ['NAME'])[0]} model.path={choice}. "
        if group == "data":
            return f"a file is given by its key: data=auto data.sources.auto.path={choice}. "
    foreign = FOREIGN_CHOICES.get(group, {}).get(choice.lower())
    bare = re.sub(r"nvidia|geforce|rtx|gtx|tesla|[^a-z0-9]", "", choice.lower())
    near = [foreign] if foreign else [option for option in options if bare and bare in option.replace("_", "")]
    near = near[:3] or get_close_matches(choice, options, n=1)
    if group == "vocab" and not near:
        return f"a SentencePiece model is given by its file: vocab=path vocab.model={choice}. "
    path = " data.sources.belle.path=FILE" if near == ["belle"] and group == "data" else ""
    return f"did you mean {' or '.join(f'{group}={name}' for name in near)}{path}? " if near else ""


def _name_unknown_key(key: str, known: list[str], schema: type, arguments: list[str]) -> str:
    parent, _, leaf = key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    value = _typed_value(key, arguments)
    everywhere = sorted({key for key, _ in _typed_keys(schema)})
    meant = FOREIGN_KEYS.get(leaf.lower(), "")
    if parent.startswith("data.sources."):
        meant = meant.replace("data.sources.NAME", parent)
    named = re.match(r"[\w.]+", meant)
    if named and (named[0] in everywhere or named[0].startswith(("hydra.", "data.sources"))) and leaf not in known:
        whole = f"{meant}={value}" if value and re.fullmatch(r"[\w.]+", meant) else meant
        return f"{key} is not a key; did you mean {whole}?"
    near = get_close_matches(leaf, known, n=1)
    if near:
        return f"{key} is not a key; did you mean {prefix}{near[0]}?"
    if key.split(".")[0] == "experiment":
        return "an experiment sets keys of the whole run; write `# @package _global_` as its first line."
    if key in everywhere:
        return f"{key} is not a key of this choice of {parent}; choose the {parent} that has it."
    elsewhere = [name for name in everywhere if name.rpartition(".")[2] == leaf]
    near = elsewhere or get_close_matches(key, everywhere, n=1, cutoff=0.8)
    if near and near[0] != parent:
        return f"{key} is not a key; did you mean {near[0]}?"
    return f"{key} is not a key; {parent or 'the configuration'} has {', '.join(known) or 'none'}."


def _typed_value(key: str, arguments: list[str]) -> str:
    typed = [a.partition("=")[2] for a in arguments if a.lstrip("+").partition("=")[0] == key]
    return typed[-1] if typed else ""


def _name_wrong_type(error: ValidationError, arguments: list[str]) -> str:
    key, reason = str(error.full_key), _first_line(error)
    quoted = re.search(r"Value '(.*)' of type|Invalid value '(.*)', expected", reason)
    value = _typed_value(key, arguments) or next((part for part in (quoted.groups() if quoted else ()) if part), "")
    received = f"{key}={value}" if value else key
    expected = re.search(r"could not be converted to (\w+)", reason)
    if expected:
        return f"{received} is not of type {expected[1].lower()}; give {key} a value of that type."
    choices = re.search(r"expected one of \[(.*)\]", reason)
    if choices:
        near = get_close_matches(value, choices[1].split(", "), n=1)
        hint = f"did you mean {key}={near[0]}? " if near else ""
        return f"{received} is not a choice; {hint}Choices: {choices[1]}."
    if "is not a subclass of SourceConfig" in reason:
        return f"source {key} cannot be added on the command line; write a file configs/data/NAME.yaml (docs/data.md)."
    if "is not Optional" in reason or "Incompatible value 'None'" in reason:
        return f"{key}=null is no value; give {key} one, or leave it out for its default."
    meant = _expected_kind(reason)
    return f"{received} is {meant}." if meant else f"{received}: {reason}."


def find_misfit(values: Any, kind: Any, path: str = "") -> tuple[str, str] | None:
    """The first key whose value has the wrong shape (a list, a mapping or one value where its schema has another), and
    a phrase that says so. OmegaConf names neither key nor place of such a mistake."""
    hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    of_all = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    for key, value in values.items():
        hint, full_key = hints.get(str(key), of_all), f"{path}{key}"
        if isinstance(value, str) and ("${" in value or value == "???"):
            continue
        if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
            if not isinstance(value, dict):
                return full_key, "no group of keys here; write its keys below it, one key: value a line"
            if (found := find_misfit(value, hint, f"{full_key}.")) is not None:
                return found
        elif typing.get_origin(hint) is list and not isinstance(value, list):
            return full_key, "no list here; write it as [a, b]"
        elif hint in (int, float, str, bool) and isinstance(value, list | dict):
            held = "a list" if isinstance(value, list) else "a group of keys"
            return full_key, f"{held} here; give one value of type {hint.__name__}"
    return None


def _expected_kind(reason: str) -> str:
    """What shape a value lacks, as a phrase, by OmegaConf's reason; empty where the reason is another."""
    if "is not a subclass of" in reason or "to a structured" in reason.lower() or "DictConfig" in reason:
        return "no group of keys; write its keys below it, one a line"
    if "ListConfig" in reason or "to a list" in reason.lower():
        return "no list; write [a, b]"
    return ""


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


def missing_keys(node: DictConfig, path: str) -> Iterator[str]:
    """Every key below a node that has no value yet, as a user types it."""
    for key in node:
        if OmegaConf.is_missing(node, key):
            yield f"{path}{key!s}"
        elif not OmegaConf.is_interpolation(node, str(key)):
            child = node[key]
            if isinstance(child, DictConfig) and not child._is_none():
                yield from missing_keys(child, f"{path}{key!s}.")


def _field_names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _typed_keys(schema: type, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a schema and of its variants, as a user types it, and the type of its value."""
    for kind in (schema, *schema.__subclasses__()):
        hints = typing.get_type_hints(kind)
        for name in _field_names(kind):
            yield path + name, hints[name]
            if dataclasses.is_dataclass(hints[name]) and isinstance(hints[name], type):
                yield from _typed_keys(hints[name], f"{path}{name}.")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")
