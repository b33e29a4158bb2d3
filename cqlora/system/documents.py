"""JSON and small files of a model's or an adapter's folder, checked, since users and disks damage them."""

import errno
import json
import math
import shutil
import unicodedata
from collections.abc import Set
from pathlib import Path
from typing import Any

from cqlora.errors import ModelError

MAX_BYTES = 256 << 20
"""Of one file; the largest tokenizers have 40 MB."""
_MISSING = object()
NAMED_TEMPLATES = "additional_chat_templates"
"""Where transformers keeps a tokenizer's chat templates that have names, beside chat_template.jinja."""
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: the file is missing, no plain file, too large, or holds something else.
    """
    text = read_text(file)
    try:
        document = _parse(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({first_words(error)}); fetch it again.") from error
    if not isinstance(document, dict):
        raise ModelError(f"{file} holds a JSON {type(document).__name__} and no object; fetch it again.")
    return document


def read_text(file: Path) -> str:
    """The text of a file of modest size.

    Raises:
        ModelError: the file is missing, no plain file, too large, or no UTF-8.
    """
    if not file.is_file():
        raise ModelError(f"{file} {_describe_other(file)}; give the folder of a whole model or adapter.")
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ModelError(f"{file} has {size:,} bytes, more than any such file needs; fetch it again.")
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as text ({first_words(error)}); fetch it again.") from error


def read_object_if_there(file: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one where there is no such file."""
    return read_object(file) if file.exists() or file.is_symlink() else {}


def take_number(
    document: dict[str, Any], key: str, file: Path, low: float, high: float, kind: type = int, default: Any = _MISSING
) -> Any:
    """A number from `low` to `high` under `key`; `default`, where there is one, for none or null.

    Raises:
        ModelError: it is missing, of another type or out of bounds.
    """
    value = document.get(key)
    if value is None and default is not _MISSING:
        return default
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise ModelError(
            f"{file} has {key}={shorten(value)} where {what} from {low:,} to {high:,} belongs; correct it or fetch "
            "the file again."
        )
    return value


def take(document: dict[str, Any], key: str, file: Path, kind: type | tuple[type, ...], default: Any = _MISSING) -> Any:
    """What is under `key`, of a type; `default`, where there is one, for nothing or null.

    Raises:
        ModelError: it is missing or of another type.
    """
    value = document.get(key)
    if value is None and default is not _MISSING:
        return default
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(
            {"str": "text", "dict": "an object", "list": "a list"}.get(k.__name__, k.__name__) for k in kinds
        )
        raise ModelError(f"{file} has {key}={shorten(value)} where {names} belongs; correct it or fetch it again.")
    return value


def shorten(value: object, length: int = 60) -> str:
    """A value as an error names it: on one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= length else f"{text[:length]}…"


def _parse(text: str) -> Any:
    document = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    if "\\u" in text:
        # Halves of a surrogate pair are read and cannot be written again.
        json.dumps(document, ensure_ascii=False).encode()
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no number")
    return number


def first_words(error: BaseException) -> str:
    """What an error says, on one line and cut where it is long."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return one_line(str(error))


def one_line(text: str) -> str:
    """Text from elsewhere as an error quotes it: on one line, cut where it is long, see escape_controls."""
    return escape_controls(" ".join(text.split()))[:120]


def escape_controls(text: str) -> str:
    """Text whose control characters, which would move a terminal's cursor or worse, are written as `\\x1b`.

    Spaces stay, the full-width one of Chinese text among them.
    """
    if text.isprintable():
        return text
    return "".join(c if is_shown(c) else c.encode("unicode_escape").decode() for c in text)


def is_shown(character: str) -> bool:
    """Whether a terminal shows it as a character or as space."""
    return character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs"


def copy_inside(file: Path, target: Path) -> None:
    """Copy a file of a folder, a link within it too, or one to the blobs of a Hugging Face hub's snapshot.

    Raises:
        ModelError: the file is a link to elsewhere, whose contents nobody gave.
    """
    folder, actual = file.parent.resolve(), file.resolve()
    blobs = [above / "blobs" for above in folder.parents[1:3]]
    if not any(actual.is_relative_to(place) for place in (folder, *blobs)):
        raise ModelError(f"{file} is a link out of its folder; put the file itself there, or remove the link.")
    shutil.copyfile(actual, target)


def carry_over(folder: Path, target: Path, rewritten: Set[str]) -> None:
    """Copy the small files of a model's folder, such as its licence: all but weights and those that are `rewritten`.

    Named chat templates go along, other folders do not.

    Raises:
        ModelError: see copy_inside.
    """
    for file in list_files(folder):
        name = file.relative_to(folder)
        if str(name) not in rewritten and file.suffix not in _WEIGHT_SUFFIXES:
            (target / name).parent.mkdir(exist_ok=True)
            copy_inside(file, target / name)


def list_files(folder: Path) -> list[Path]:
    """The files of a model's folder, its named chat templates among them."""
    return sorted(file for file in (*folder.iterdir(), *(folder / NAMED_TEMPLATES).glob("*.jinja")) if file.is_file())


def write_json(file: Path, document: object) -> None:
    """Write JSON as people read it."""
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe_other(path: Path) -> str:
    """What there is in place of a plain file."""
    if path.is_dir():
        return "is a folder and no file"
    if path.exists():
        return "is no plain file"
    if not path.is_symlink():
        return "does not exist"
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return f"is a link to {path.readlink()}, which leads back to it"
    return f"is a link to {path.readlink()}, which does not exist"
