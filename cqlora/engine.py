"""`LlamaEngine`: a base with its adapter, or a merged model, to talk to."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cqlora.base import fingerprint_tokenizer, fingerprint_weights, read_base
from cqlora.data.chat import ChatEncoder
from cqlora.data.tokenizer import PlainTokenizer, read_json
from cqlora.errors import ModelError
from cqlora.inference.architecture import read_architecture
from cqlora.inference.batch import ContinuousBatch, Reply
from cqlora.inference.decoder import Decoder
from cqlora.inference.requests import Sampling, read_messages
from cqlora.inference.text import ReplyText, TokenBytes
from cqlora.inference.weights import assemble, read_folder
from cqlora.preflight import check_adapter_folder, check_fingerprints

Messages = Sequence[Mapping[str, object]]


class LlamaEngine:
    """Generates replies from a model on this machine.

        LlamaEngine(adapter_dir, base_dir, use_lora=True)
        LlamaEngine(merged_dir, "", use_lora=False)

    Raises:
        ModelError: a folder that is missing, damaged, of another architecture, or an adapter of another base.
    """

    def __init__(self, model_dir: str | Path, base_dir: str | Path = "", use_lora: bool = True) -> None:
        folder = Path(model_dir)
        weights = Path(base_dir) if use_lora else folder
        base = read_base(weights)
        if use_lora:
            check_adapter_folder(folder)
            check_fingerprints(folder, fingerprint_tokenizer(weights), fingerprint_weights(weights))
            raise ModelError("adapters are not joined yet")
        self.name = folder.name
        self._tokenizer = PlainTokenizer(weights)
        self._token_bytes = TokenBytes(weights)
        self._end_ids = find_end_ids(weights, self._tokenizer)
        architecture = read_architecture(base.config, weights)
        self._decoder = Decoder(architecture, assemble(architecture, read_folder(weights, torch.float32)))
        self.max_length = architecture.max_length
        """Positions that prompt and reply share."""

    def generate(self, messages: Messages, **sampling: Any) -> str:
        """The assistant's reply; keywords are the fields of Sampling."""
        return "".join(self.stream(messages, **sampling))

    def stream(self, messages: Messages, **sampling: Any) -> Iterator[str]:
        """The reply as it comes, in whole characters."""
        batch = self.open_batch(1)
        reply = batch.admit(self.encode_messages(messages), Sampling(**sampling))
        return _drain(batch, reply)

    def generate_batch(self, conversations: Sequence[Messages], **sampling: Any) -> list[str]:
        """A reply to each conversation, generated together."""
        batch = self.open_batch(len(conversations))
        asked = Sampling(**sampling)
        replies = [batch.admit(self.encode_messages(messages), asked) for messages in conversations]
        texts = {id(reply): "" for reply in replies}
        while batch.free_slots < len(replies):
            for reply, text in batch.step():
                texts[id(reply)] += text
        return [texts[id(reply)] for reply in replies]

    def open_batch(self, slots: int) -> ContinuousBatch:
        """A batch of up to `slots` replies that come and go."""
        return ContinuousBatch(self._decoder, self._end_ids, lambda stop: ReplyText(self._token_bytes, stop), slots)

    def encode_messages(self, messages: Messages) -> list[int]:
        """Ids of a conversation in the training template, up to where the assistant's words come.

        Control tokens in a message stay text.

        Raises:
            DataError: an unknown role, a message without a body, or no message.
            ModelError: the tokenizer has no chat tokens.
        """
        return ChatEncoder(self._tokenizer).encode_prompt(read_messages(messages))

    def encode_text(self, prompt: str) -> list[int]:
        """Ids of a text to go on from, as a document begins in training; control tokens stay text."""
        ids: list[int] = self._tokenizer.text.encode(prompt, add_special_tokens=False).ids
        return [self._tokenizer.special.document_start, *ids]


def find_end_ids(folder: Path, tokenizer: PlainTokenizer) -> frozenset[int]:
    """Tokens that end a reply: the template's, the document's, and those that the base's own files name."""
    special = tokenizer.special
    found = {special.document_end, special.turn_end}
    for name in ("config.json", "generation_config.json"):
        named = read_json(folder / name).get("eos_token_id")
        found |= set(named) if isinstance(named, list) else {named}
    return frozenset(token for token in found if token is not None)


def _drain(batch: ContinuousBatch, reply: Reply) -> Iterator[str]:
    while reply.finish_reason is None:
        for _, text in batch.step():
            if text:
                yield text
