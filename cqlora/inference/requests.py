"""What is asked of the engine: messages and how to sample; checked before torch is imported."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cqlora.data.records import ROLES, Turn
from cqlora.errors import ConfigError, DataError

_HELD = {
    "quantization": ("auto", "nf4", "none"),
    "dtype": ("auto", "float32", "bfloat16"),
    "device": ("auto", "cpu", "cuda"),
}


@dataclass(kw_only=True, slots=True, frozen=True)
class Sampling:
    """How the next token is chosen and when a reply ends."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    """0 takes the likeliest token each time."""
    top_p: float = 0.9
    """Sample among the fewest likeliest tokens that together have this probability; 1 is all."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 is all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens already in prompt or reply, multiplies the negative (1909.05858)."""
    stop: tuple[str, ...] = ()
    """Strings that end a reply and are not part of it."""
    seed: int | None = None
    """The same seed, prompt and model give the same reply, whatever else is in the batch."""
    ignore_end: bool = False
    """Go on past end tokens, for measuring."""

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(0.0 <= self.temperature < math.inf, "temperature", self.temperature, "0 (greedy) or above")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or above")
        _require(0.0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "above 0")
        _require(not isinstance(self.stop, str), "stop", self.stop, "a tuple of strings")
        _require(all(self.stop), "stop", self.stop, "strings that are not empty")
        in_range = self.seed is None or -(1 << 63) <= self.seed < 1 << 63
        _require(in_range, "seed", self.seed, "a whole number of at most 63 bits")


def check_held(quantization: str, dtype: str, device: str) -> None:
    """Raise ConfigError for a way to hold a model that there is not; `device` may be a numbered GPU, `cuda:1`."""
    for key, value in {"quantization": quantization, "dtype": dtype, "device": device}.items():
        if value not in _HELD[key] and not (key == "device" and re.fullmatch(r"cuda:\d{1,2}", value)):
            raise ConfigError(f"{key}={value} is unknown; use {', '.join(_HELD[key])}.")


def repair_text(text: str) -> str:
    """The text as valid Unicode: JSON may bring half of a surrogate pair, which becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_messages(messages: Sequence[Mapping[str, object]]) -> list[Turn]:
    """The turns of a conversation; a message's body stands under `text` or `content`.

    Raises:
        DataError: no message, an unknown role, or a message without a body.
    """
    if not messages:
        raise DataError('there is no message; give at least one such as {"role": "user", "text": "…"}.')
    return [_read_message(number, message) for number, message in enumerate(messages, start=1)]


def _read_message(number: int, message: Mapping[str, object]) -> Turn:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"message {number} has role={role!r}; use one of {', '.join(ROLES)}.")
    body = message.get("content", message.get("text"))
    if not isinstance(body, str):
        held = "no body" if body is None else f"a body of type {type(body).__name__}"
        raise DataError(f"message {number} ({role}) has {held}; give its words as a string under `content` or `text`.")
    return Turn(role, repair_text(body))


def _require(right: bool, name: str, value: object, expected: str) -> None:
    if not right:
        raise ConfigError(f"{name}={value} cannot be sampled with; use {expected}.")
