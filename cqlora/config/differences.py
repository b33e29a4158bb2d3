"""`merge add=`: differences of two models, as text (`0.5*chat-base`) or as a mapping (`{model, minus, weight}`)."""

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqlora.config.checks import check_path
from cqlora.errors import ConfigError

_WEIGHT = re.compile(r"\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*\*\s*(.*)", re.DOTALL)
_FORM = "use add=[CHAT-BASE], add=[0.5*CHAT-BASE] or add=[{model:CHAT,minus:BASE,weight:0.5}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class DifferenceConfig:
    """`weight` times what tells one model from another."""

    model: str
    """Folder of the model, such as one that was taught to chat."""
    minus: str
    """Folder of what it was made from."""
    weight: float = 1.0
    """By what the difference is multiplied; below zero it is taken away."""

    def __post_init__(self) -> None:
        for key, folder in (("model", self.model), ("minus", self.minus)):
            check_path(f"add.{key}", folder)
            if not (Path(folder) / "config.json").is_file():
                raise ConfigError(f"add= names {folder}, which holds no model; {_FORM}.")
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ConfigError(f"add= has a weight of {self.weight}, which adds nothing that is known; give another.")


def parse_differences(entries: Any) -> list[DifferenceConfig]:
    """The differences of `add=`.

    Raises:
        ConfigError: an entry of another form, folders that hold no model, or one pair twice.
    """
    if not isinstance(entries, list):
        raise ConfigError(f"add={entries} is no list of differences; {_FORM}.")
    parsed = [_parse_mapping(entry) if isinstance(entry, dict) else _parse_text(entry) for entry in entries]
    pairs = [(each.model, each.minus) for each in parsed]
    for pair in pairs:
        if pairs.count(pair) > 1:
            raise ConfigError(f"add= names {pair[0]}-{pair[1]} twice; give it once, with the sum of both weights.")
    return parsed


def _parse_mapping(entry: dict[Any, Any]) -> DifferenceConfig:
    known = {each.name for each in dataclasses.fields(DifferenceConfig)}
    weight = entry.get("weight", 1.0)
    folders = [entry.get("model"), entry.get("minus")]
    if set(entry) - known or isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ConfigError(f"add={entry} is no difference; {_FORM}.")
    if not all(isinstance(folder, str) for folder in folders):
        raise ConfigError(f"add={entry} names no two folders; {_FORM}.")
    model, minus = map(os.path.expanduser, folders)
    return DifferenceConfig(model=model, minus=minus, weight=float(weight))


def _parse_text(entry: Any) -> DifferenceConfig:
    """`0.5*chat-base`; of the hyphens, which folders' names have too, the one between two models divides."""
    text = str(entry)
    weighted = _WEIGHT.fullmatch(text)
    weight, folders = (float(weighted[1]), weighted[2]) if weighted else (1.0, text)
    halves = [(folders[: hyphen.start()], folders[hyphen.end() :]) for hyphen in re.finditer("-", folders)]
    divided = [(os.path.expanduser(left.strip()), os.path.expanduser(right.strip())) for left, right in halves]
    whole = [pair for pair in divided if all((Path(folder) / "config.json").is_file() for folder in pair)]
    if len(whole) != 1:
        told = "is the difference of no two model folders" if not whole else "can be read in more than one way"
        raise ConfigError(f"add={text} {told}; {_FORM}.")
    return DifferenceConfig(model=whole[0][0], minus=whole[0][1], weight=weight)
