"""Files of one JSON object a line, to which several processes append; a kill may cut the last line short."""

import fcntl
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from cqlora.system.refusals import NoRoom, described_as_sentence

logger = logging.getLogger(__name__)


def append_object(file: Path, row: dict[str, Any]) -> None:
    """Add one line, at once readable by others.

    Raises:
        DiskError: the disk refused; the file ends as it did before.
    """
    with described_as_sentence(file), file.open("ab+", buffering=0) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, end - 1))
        # A line that a kill cut short stays a line of its own.
        begun = end > 0 and stream.read(1) != b"\n"
        line = b"\n" * begun + to_line(row).encode()
        if (written := stream.write(line)) < len(line):
            stream.truncate(end)
            raise NoRoom(len(line) - written)


def read_objects(file: Path) -> list[tuple[int, dict[str, Any] | None]]:
    """Every whole line by its number, None for one that holds no object; one that a kill cut short is not whole."""
    if not file.is_file():
        return []
    return [(number, read_line(line)) for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1)]


def read_line(line: bytes) -> dict[str, Any] | None:
    """The line's object; None where it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def tell_damage(file: Path, number: int) -> None:
    """Say that a line was left out."""
    logger.warning("%s, line %d is damaged and left out", file, number)


def to_line(row: dict[str, Any]) -> str:
    """One JSON line; a non-finite number becomes its name, since JSON has none."""
    finite = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    line = json.dumps(finite, ensure_ascii=False)
    # Half a character, which damage or a tokenizer may leave, has no UTF-8.
    return (line if is_encodable(line) else json.dumps(finite)) + "\n"


def is_encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
