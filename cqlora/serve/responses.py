"""Replies in OpenAI's shapes, whole and as a stream of server-sent events."""

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DONE = "data: [DONE]\n\n"
_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})
"""Of Unicode's, those that JSON leaves as they are: readers of lines, httpx among them, would end an event there."""


@dataclass(slots=True)
class Answer:
    """One reply, and what all of its messages repeat."""

    model: str
    prompt_tokens: int
    chat: bool
    """Of /v1/chat/completions, not of /v1/completions."""
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex

    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def whole(self, text: str, finish_reason: str) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage()}

    def opening(self) -> str:
        """The event that a chat's stream begins with."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self.chat else ""

    def delta(self, text: str, finish_reason: str | None) -> str:
        """An event with the next characters; the last one carries the reason."""
        if self.chat:
            return self._chunk({"delta": {"content": text} if text else {}}, finish_reason)
        return self._chunk({"text": text}, finish_reason)

    def closing_usage(self) -> str:
        """The event that tells the usage, after the last delta."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()})

    def _chunk(self, said: Mapping[str, Any], finish_reason: str | None) -> str:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
        }


def event(body: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False).translate(_LINE_ENDS)}\n\n"
