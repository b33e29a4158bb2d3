"""A YAML file as its writer sees it: what is wrong with it, and on which line a key stands."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

_HINTS = (
    (r"found character '\\t'", "indent with spaces, not with tabs"),
    (r"expected ',' or '[\]}]'.*", "close the bracket"),
    (r"found duplicate key", "keep one of them"),
    (r"mapping values are not allowed.*", "quote a value that holds a colon, or start a new line"),
    (r"could not find expected ':'.*", "write key: value"),
    (r"found unexpected end of stream.*", "close the quote"),
    (r"special characters are not allowed.*", "it looks like no text; give a YAML file"),
)


def describe_damage(file: Path, error: Exception) -> str:
    """The sentence for a file that Hydra could not read: file, line, what is wrong, what to do."""
    if isinstance(error, yaml.YAMLError):
        return describe_yaml_error(file, error)
    if isinstance(error, UnicodeDecodeError):
        return f"{name_file(file)} is not UTF-8 text; save it as UTF-8."
    if isinstance(error, RecursionError):
        return f"{name_file(file)} nests too deeply, or holds itself by an alias; write its values out."
    if isinstance(error, OSError) and error.strerror:
        return f"{name_file(file)} cannot be read: {error.strerror}."
    return f"{name_file(file)} is no configuration: {str(error).partition(chr(10))[0].rstrip('.')}."


def describe_yaml_error(file: Path, error: yaml.YAMLError) -> str:
    """The sentence for a parser's error."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).partition("\n")[0]
    hint = next((hint for pattern, hint in _HINTS if re.match(pattern, problem)), "")
    line = f", line {mark.line + 1}" if mark is not None else ""
    return f"{name_file(file)}{line} is no YAML ({problem}){f'; {hint}' if hint else ''}."


def locate_key(file: Path, key: str) -> str:
    """`FILE, line N` of a dotted key, whose first parts may be those of the file's package; `FILE` where it is not."""
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    parts = re.split(r"[.\[\]]+", key.rstrip("]"))
    lines = (walk_down(node, parts[start:]) for start in range(len(parts)))
    line = next((line for line in lines if line is not None), None)
    return name_file(file) if line is None else f"{name_file(file)}, line {line}"


def holds_key(file: Path, key: str) -> bool:
    """Whether a dotted key stands in a file, with a value or `???`."""
    return walk_down(yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), key.split(".")) is not None


def locate_words(file: Path, words: str) -> str:
    """`FILE, line N` of the first line with these words; empty where there is none."""
    lines = file.read_text(encoding="utf-8").splitlines()
    found = next((number for number, line in enumerate(lines, start=1) if words in line), None)
    return "" if found is None else f"{name_file(file)}, line {found}"


def walk_down(node: Any, parts: list[str]) -> int | None:
    """The line of the key that the parts lead to; None where they lead nowhere."""
    line = None
    for part in parts:
        if isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
            continue
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((key, value) for key, value in pairs if str(key.value) == part), None)
        if found is None:
            return None
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def name_file(file: Path) -> str:
    """The file's path from the working folder, where it lies below it."""
    relative = os.path.relpath(file)
    return str(file) if relative.startswith("..") else relative
