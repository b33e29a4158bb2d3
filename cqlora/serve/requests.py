"""What clients may ask: OpenAI's fields, each obeyed or refused in one sentence, none ignored that has a meaning."""

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cqlora.inference.requests import Sampling
from cqlora.serve.failure import Failure

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that this server has no use for, with the values that ask for nothing; null is one of all."""
BOOKKEEPING = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
"""Fields that change no reply, whatever they say."""
MOST_MESSAGES = 4096
MOST_PARTS = 1024
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 1024
"""A reply's end is compared with a stop string at every token."""
_SHOWN = 60
"""Characters of what was received that an error repeats."""
_INSTEAD = {"frequency_penalty": "use repetition_penalty", "presence_penalty": "use repetition_penalty"}


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Request(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_what_is_not_served(cls, data: Any) -> Any:
        """Drop the fields that ask for nothing, refuse those that do."""
        if not isinstance(data, dict):
            return data
        for field, value in data.items():
            if field in NEUTRAL and value is not None and value not in NEUTRAL[field]:
                instead = _INSTEAD.get(field, "leave it out")
                raise Failure(400, f"`{field}` is not supported by this server; {instead}.", "unsupported_parameter")
        return {field: value for field, value in data.items() if field not in NEUTRAL and field not in BOOKKEEPING}

    @property
    def wants_usage(self) -> bool:
        """Whether a stream's last chunk tells the tokens used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def limit(self) -> int | None:
        """The longest reply asked for, in tokens."""
        return self.max_tokens

    def sampling(self, most: int) -> Sampling:
        """How to generate; `most` is the longest reply that the server gives.

        Raises:
            Failure: a longer one is asked for.
        """
        limit = self.limit()
        if limit is not None and limit > most:
            raise Failure(400, f"max_tokens={limit} is more than this server's {most}; ask for less.", "invalid_value")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MOST_STOPS or not all(0 < len(string) <= MOST_STOP_CHARACTERS for string in stop):
            sentence = f"`stop` takes up to {MOST_STOPS} strings of 1 to {MOST_STOP_CHARACTERS} characters."
            raise Failure(400, sentence, "invalid_value")
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
            if (value := getattr(self, name)) is not None
        }
        return Sampling(max_new_tokens=limit or most, stop=tuple(stop), **given)


class TextPart(BaseModel):
    """One part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message; its words stand under `content` or `text`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_PARTS, fail_fast=True)] | None = None
    text: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[None], Field(fail_fast=True)] | None = None

    def turn(self) -> dict[str, str]:
        """The message as the engine takes it.

        Raises:
            Failure: it has no words.
        """
        words = self.content if self.content is not None else self.text
        if words is None:
            raise Failure(400, f"the {self.role}'s message has no `content`; give its words.", "invalid_value")
        body = words if isinstance(words, str) else "".join(part.text for part in words)
        return {"role": "system" if self.role == "developer" else self.role, "content": body}


class ChatRequest(Request):
    """A body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)

    def limit(self) -> int | None:
        """max_completion_tokens, or max_tokens, its older name."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """A body of /v1/completions."""

    prompt: str | Annotated[list[str], Field(fail_fast=True)] = Field(min_length=1)

    def text(self) -> str:
        """The one prompt.

        Raises:
            Failure: there are several.
        """
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len(prompts) > 1:
            raise Failure(400, "`prompt` holds several texts; send one a request.", "unsupported_parameter")
        return prompts[0]


def explain(errors: list[dict[str, Any]]) -> Failure:
    """One of pydantic's errors as a sentence: the deepest, since of a union that one is about the nearest kind."""
    error = max(errors, key=lambda error: len(error["loc"]))
    where = shorten(".".join(str(part) for part in error["loc"] if part != "str" and "[" not in str(part)))
    if error["type"] == "extra_forbidden":
        fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *NEUTRAL}
        near = get_close_matches(where, fields, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "leave it out."
        return Failure(400, f"`{where}` is not a field of this request; {hint}", "unknown_parameter")
    if error["type"] == "missing":
        return Failure(400, f"`{where or 'the body'}` is missing.", "missing_parameter")
    if not where:
        return Failure(400, "the body is no JSON object sent as application/json.", "invalid_json")
    sentence = error["msg"][0].lower() + error["msg"][1:]
    return Failure(400, f"`{where}` is {shorten(repr(error['input']))}: {sentence}.", "invalid_value")


def shorten(text: str) -> str:
    """What was received, as far as an error repeats it."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "…"
