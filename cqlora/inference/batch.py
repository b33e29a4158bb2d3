"""Replies that are generated together: each may come and go at any step."""

import logging
from collections.abc import Callable
from typing import Literal

import torch

from cqlora.errors import DataError
from cqlora.inference.cache import KeyValueCache, Shelf
from cqlora.inference.choice import TokenChooser
from cqlora.inference.decoder import Decoder, Segment
from cqlora.inference.prefix_cache import PrefixCache
from cqlora.inference.requests import Sampling
from cqlora.inference.text import ReplyText

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 512
"""Prompt tokens in one forward pass, which bounds the memory that a long prompt takes."""


class Reply:
    """One reply on its way: how many tokens it has and why it ended."""

    def __init__(
        self, prompt_ids: list[int], sampling: Sampling, decoder: Decoder, text: ReplyText, cache: KeyValueCache
    ) -> None:
        self.ids = list(prompt_ids)
        """Prompt and reply; the first of them are in `cache`."""
        self.prompt_tokens = len(prompt_ids)
        self.reused_tokens = cache.length
        """Tokens of the prompt that had been read for another reply."""
        self.completion_tokens = 0
        """Tokens generated, the end token among them."""
        self.finish_reason: Literal["stop", "length"] | None = None
        """None while the reply goes on; `stop` at an end token or stop string, `length` where there is no more room."""
        self.failure: Exception | None = None
        """Why the reply ended without a reason to finish: an error of its own, or of the step that it was in."""
        self.text = text
        self.ignore_end = sampling.ignore_end
        self.seeded = sampling.seed is not None
        room = decoder.architecture.max_length - len(prompt_ids)
        self.max_tokens = min(sampling.max_new_tokens, room)
        self.chooser = TokenChooser(sampling, prompt_ids, decoder.architecture.vocab_size)
        self.cache = cache
        self.pending = self.ids[cache.length :]
        """Tokens that the model has not seen yet."""


class ContinuousBatch:
    """Up to `slots` replies; every step gives each of them one token."""

    def __init__(
        self,
        decoder: Decoder,
        prefixes: PrefixCache,
        end_ids: frozenset[int],
        new_text: Callable[[tuple[str, ...]], ReplyText],
        slots: int,
    ) -> None:
        self._decoder = decoder
        self._prefixes = prefixes
        self._end_ids = end_ids
        self._new_text = new_text
        self._slots = slots
        self._replies: list[Reply] = []
        self._shelf = Shelf(slots)

    @property
    def free_slots(self) -> int:
        """Replies that can still be admitted."""
        return self._slots - len(self._replies)

    def admit(self, prompt_ids: list[int], sampling: Sampling) -> Reply:
        """Take a slot for a reply to this prompt; its first token comes with the next step.

        Raises:
            DataError: the prompt is empty, leaves no position for a reply, or holds an id that is no token's.
            RuntimeError: no slot is free.
        """
        if self.free_slots == 0:
            raise RuntimeError(f"all {self._slots} slots of the batch are taken")
        longest = self._decoder.architecture.max_length
        if not prompt_ids:
            raise DataError("the prompt is empty; give at least one character.")
        if len(prompt_ids) + 1 > longest:
            raise DataError(
                f"the prompt has {len(prompt_ids)} tokens and the model holds {longest} with the reply; shorten it, "
                "or drop the earliest messages."
            )
        rows = self._decoder.architecture.vocab_size
        strange = next((token for token in prompt_ids if not 0 <= token < rows), None)
        if strange is not None:
            raise DataError(f"the prompt holds token id {strange}; give ids from 0 to {rows - 1}.")
        # What was read in other portions differs in its last bits, and a seed promises the same reply to the letter.
        cache = self._decoder.new_cache() if sampling.seed is not None else self._prefixes.open(prompt_ids)
        reply = Reply(prompt_ids, sampling, self._decoder, self._new_text(sampling.stop), cache)
        self._replies.append(reply)
        return reply

    def step(self) -> list[tuple[Reply, str]]:
        """One token for every reply: the reply and its new whole characters, "" where none is complete.

        A reply that ends in this step has its `finish_reason` and leaves the batch; so does one that an error ends,
        which has its `failure`. An error in what the replies do together ends all that took part in it.
        """
        # A prompt runs alone, so that its numbers do not depend on what else is in the batch.
        fresh = [reply for reply in self._replies if reply.completion_tokens == 0]
        going = [reply for reply in self._replies if reply.completion_tokens > 0]
        logits: dict[int, torch.Tensor] = {}
        for replies, read in [*(([reply], self._read_prompt) for reply in fresh), (going, self._read_tokens)]:
            if replies:
                try:
                    logits |= read(replies)
                except Exception as error:  # noqa: BLE001 - whatever it is, others go on
                    self._fail(replies, error)
        produced = [(reply, self._advance_alone(reply, logits.get(id(reply)))) for reply in self._replies]
        for reply in [reply for reply in self._replies if reply.finish_reason]:
            self.release(reply)
        for reply in [reply for reply in self._replies if reply.failure]:
            self._drop(reply)
        return produced

    def release(self, reply: Reply) -> None:
        """Drop a reply that nobody waits for any more: its slot is free at once, its memory goes to the prefix cache.

        Nothing happens where it has left already.
        """
        if any(other is reply for other in self._replies):
            self._replies = [other for other in self._replies if other is not reply]
            self._prefixes.keep(reply.ids, reply.cache)
            self._shelf.leave(reply.cache)

    def _drop(self, reply: Reply) -> None:
        """Let a reply go that an error has ended: what it has read may be wrong, so nobody goes on from it."""
        self._replies = [other for other in self._replies if other is not reply]
        reply.cache.clear()
        self._shelf.leave(reply.cache)

    def _fail(self, replies: list[Reply], error: Exception) -> None:
        logger.error("%d of %d replies end by an error", len(replies), len(self._replies), exc_info=error)
        for reply in replies:
            reply.failure = error

    def _read_tokens(self, replies: list[Reply]) -> dict[int, torch.Tensor]:
        """Logits after the newest token of each, by the reply's id."""
        self._shelf.arrange([reply.cache for reply in replies])
        rows = {id(cache): row for row, cache in enumerate(self._shelf.caches)}
        ordered = sorted(replies, key=lambda reply: rows.get(id(reply.cache), len(rows)))
        segments = [Segment(reply.cache, reply.pending) for reply in ordered]
        steady = any(reply.seeded for reply in replies)
        logits = self._decoder.next_logits(segments, steady, shelf=None if len(rows) == 1 else self._shelf)
        return {id(reply): row for reply, row in zip(ordered, logits, strict=True)}

    def _read_prompt(self, replies: list[Reply]) -> dict[int, torch.Tensor]:
        """Logits after the prompt of one reply, by its id."""
        (reply,) = replies
        for first in range(0, len(reply.pending), PREFILL_TOKENS):
            portion = reply.pending[first : first + PREFILL_TOKENS]
            logits = self._decoder.next_logits([Segment(reply.cache, portion)])
        return {id(reply): logits[0]}

    def _advance_alone(self, reply: Reply, logits: torch.Tensor | None) -> str:
        """As _advance; an error ends this reply and no other. Nothing where one has ended it already."""
        if logits is None:
            return ""
        try:
            return self._advance(reply, logits)
        except Exception as error:  # noqa: BLE001 - whatever it is, others go on
            self._fail([reply], error)
            return ""

    def _advance(self, reply: Reply, logits: torch.Tensor) -> str:
        """Choose a reply's next token; return the text that it completes."""
        token = reply.chooser.choose(logits)
        reply.completion_tokens += 1
        reply.ids.append(token)
        reply.pending = [token]
        if token in self._end_ids and not reply.ignore_end:
            reply.finish_reason = "stop"
            return reply.text.finish()
        text = reply.text.add(token)
        if reply.text.stopped:
            reply.finish_reason = "stop"
        elif reply.completion_tokens >= reply.max_tokens:
            reply.finish_reason = "length"
            text += reply.text.finish()
        return text
