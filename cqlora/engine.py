"""`LlamaEngine`: a base with its adapter, or a merged model, to talk to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cqlora.data.chat import ChatEncoder
from cqlora.data.fitting import open_with
from cqlora.data.rendered import TemplateEncoder
from cqlora.data.templates import form_of_adapter, form_of_model
from cqlora.data.tokenizer import PlainTokenizer
from cqlora.errors import ConfigError, ModelError
from cqlora.inference.batch import ContinuousBatch, Reply
from cqlora.inference.damage import described_as_damage
from cqlora.inference.decoder import Query, Scores, Segment
from cqlora.inference.opening import Request, open_decoder
from cqlora.inference.prefix_cache import PrefixCache
from cqlora.inference.requests import Sampling, check_held, read_messages, repair_text
from cqlora.inference.text import ReplyText, TokenBytes
from cqlora.system.cuda import require_cuda, require_kernels
from cqlora.system.machine import list_gpus

Messages = Sequence[Mapping[str, object]]


class LlamaEngine:
    """Generates replies from a model on this machine.

        LlamaEngine(adapter_dir, base_dir, use_lora=True)
        LlamaEngine(merged_dir, "", use_lora=False)

    Raises:
        ModelError: a folder that is missing, damaged, of another architecture, or an adapter of another base.
    """

    def __init__(
        self,
        model_dir: str | Path,
        base_dir: str | Path = "",
        use_lora: bool = True,
        *,
        quantization: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        cache: bool = False,
        prefix_cache_gib: float = 0.0,
        held_as: str | Path = "",
    ) -> None:
        """Load the model.

        `quantization` is `auto` (the base as the adapter was trained on it, a merged model as it is), `nf4` or
        `none`; `dtype` is `auto` (what computes fastest here), `float32` or `bfloat16`; `cache` keeps a snapshot
        that the next load maps; `prefix_cache_gib` is the memory in which keys and values of ended replies wait for
        prompts that begin with the same tokens. `held_as` is an adapter whose card says how quantization=nf4 holds a
        model that is loaded without it, for the two to differ by the adapter alone.
        """
        request = find_request(model_dir, base_dir, use_lora, quantization, dtype, device, cache)
        if held_as:
            request = replace(request, held_as=Path(held_as))
        with described_as_damage(request.model_dir, request.base_dir):
            self._open(request)
        self._prefixes = PrefixCache(self._decoder, int(prefix_cache_gib * 2**30))

    def _open(self, request: Request) -> None:
        self._decoder, form = open_decoder(request)
        # Matrices whose sizes do not match fail in the first pass: here, and not at a user's first request.
        self._decoder.next_logits([Segment(self._decoder.new_cache(), [0])])
        self.name = request.model_dir.resolve().name
        self.form = str(form)
        """How the matrices are held and computed."""
        self.max_length = self._decoder.architecture.max_length
        """Positions that prompt and reply share."""
        self._tokenizer = PlainTokenizer(request.folder)
        self._token_bytes = TokenBytes(request.folder)
        if request.base_dir is not None:
            self._form = form_of_adapter(request.model_dir, request.base_dir)
        else:
            self._form = form_of_model(request.model_dir)
        self._folder = request.folder
        self.system_prompt = self._form.system_prompt
        """What a conversation without a system's message begins with, as it did in training; empty for nothing."""
        self._end_ids = self._tokenizer.end_ids
        if self._form.source:
            self._end_ids |= {self._chat.end}

    @cached_property
    def _chat(self) -> ChatEncoder | TemplateEncoder:
        """The template that the model was trained in, else its own."""
        return self._form.open(self._tokenizer, self._folder)

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
                if reply.failure:
                    raise reply.failure
                texts[id(reply)] += text
        return [texts[id(reply)] for reply in replies]

    def score(self, queries: Sequence[Query]) -> list[Scores]:
        """The log-probabilities of given tokens after given ones, all queries in one pass."""
        return self._decoder.score(queries)

    def open_batch(self, slots: int) -> ContinuousBatch:
        """A batch of up to `slots` replies that come and go."""
        return ContinuousBatch(
            self._decoder, self._prefixes, self._end_ids, lambda stop: ReplyText(self._token_bytes, stop), slots
        )

    def encode_messages(self, messages: Messages) -> list[int]:
        """Ids of a conversation in the training template, up to where the assistant's words come.

        Control tokens in a message stay text.

        Raises:
            DataError: an unknown role, a message without a body, no message, or turns that the template does not take.
            ModelError: the tokenizer has no chat tokens.
        """
        return self._chat.encode_prompt(open_with(self.system_prompt, read_messages(messages)))

    def encode_document(self, text: str) -> list[int]:
        """Ids of a whole document, between the tokens that begin and end one in training."""
        return [*self.encode_text(text), self._tokenizer.special.document_end]

    def encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """Ids of the parts of one document, each encoded by itself, the first with the token that begins one."""
        return self._tokenizer.encode_parts(parts)

    @property
    def knows_turns(self) -> bool:
        """Whether the tokenizer has the tokens of a conversation's turns."""
        return self._form.fits(self._tokenizer)

    def encode_text(self, prompt: str) -> list[int]:
        """Ids of a text to go on from, as a document begins in training; control tokens stay text."""
        # Of tokenizers' calls those for a batch alone let other threads go on meanwhile.
        (encoded,) = self._tokenizer.text.encode_batch_fast([repair_text(prompt)], add_special_tokens=False)
        ids: list[int] = encoded.ids
        return [self._tokenizer.special.document_start, *ids]


def find_request(
    model_dir: str | Path, base_dir: str | Path, use_lora: bool, quantization: str, dtype: str, device: str, cache: bool
) -> Request:
    """The folders to open, recognised by the files in them.

    Raises:
        ConfigError: a form that there is not, or a device that this machine has not.
        ModelError: an adapter where a merged model was promised, or the other way round.
    """
    check_held(quantization, dtype, device)
    folder = Path(model_dir)
    is_adapter = (folder / "adapter_config.json").is_file()
    if use_lora and not is_adapter:
        what = "holds no adapter (adapter_config.json)" if folder.is_dir() else "does not exist"
        raise ModelError(f"{folder} {what}; give an adapter folder, or a merged model with use_lora=False.")
    if use_lora and not str(base_dir):
        raise ModelError(f"{folder} is an adapter and needs its base; give the base's folder as base_dir.")
    if not use_lora and is_adapter and not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is an adapter and no whole model; give its base too, with use_lora=True.")
    if not use_lora and str(base_dir):
        raise ModelError(f"base_dir={base_dir} has no use without an adapter; leave it empty, or set use_lora=True.")
    return Request(folder, Path(base_dir) if use_lora else None, quantization, dtype, cache, find_device(device))


def find_device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU where there is one.

    Raises:
        ConfigError: this machine does not have it, or torch cannot use it.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "cpu" and not gpus and list_gpus():
        require_cuda(f"device={name}", instead="device=cpu")
    device = torch.device(("cuda" if gpus else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(f"device={name} is not on this machine; use device=auto.")
    if device.type == "cuda":
        require_kernels(device, instead="device=cpu")
    return device


def _drain(batch: ContinuousBatch, reply: Reply) -> Iterator[str]:
    try:
        while reply.finish_reason is None:
            for _, text in batch.step():
                if reply.failure:
                    raise reply.failure
                if text:
                    yield text
    finally:
        # A reply that nobody reads to its end leaves its keys and values too.
        batch.release(reply)
