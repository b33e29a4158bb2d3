"""A base's tokenizer as the encoder needs it: plain text never yields a control token."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from cqlora.data.fast_tokenizer import FastTokenizer, agrees
from cqlora.data.text_tokens import StockTokens, TextTokens
from cqlora.errors import ModelError
from cqlora.system.documents import first_words, read_object, read_object_if_there, read_text, take

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the control tokens."""

    bos: int | None
    """The tokenizer's own beginning-of-text token; None where it has none, or where it is `<|im_start|>`."""
    document_start: int
    document_end: int
    turn_start: int | None
    turn_end: int | None


class PlainTokenizer:
    """Text to ids, without special tokens of its own adding, with control tokens' text split like any other.

    `text` encodes whole texts; `segment` encodes what stands after a control token, where a SentencePiece
    tokenizer puts no space before the first word. Where `fast`, which `prove_fast` must have found true, both
    are done by a faster library.
    """

    def __init__(self, folder: Path, fast: bool = False) -> None:
        if not (folder / "tokenizer.json").is_file():
            raise ModelError(f"{folder} has no tokenizer.json; give the folder of a converted model.")
        self._folder = folder
        self._names = read_special_names(folder)
        self.special = resolve_special_tokens(self.text, self._names, folder)
        self.dtype = np.dtype(np.uint16 if self.text.get_vocab_size() <= 1 << 16 else np.uint32)
        self._fast = fast

    @cached_property
    def _document(self) -> dict[str, Any]:
        """tokenizer.json, every control token flagged as one."""
        document = read_object(self._folder / "tokenizer.json")
        document["truncation"] = document["padding"] = None
        for token in document.get("added_tokens") or []:
            # encode_special_tokens leaves alone only what is flagged special.
            token["special"] = token["special"] or token["content"] in self._names.values()
        return document

    @cached_property
    def text(self) -> Tokenizer:
        """For whole texts."""
        tokenizer = parse_tokenizer(read_text(self._folder / "tokenizer.json"), self._folder)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        controls = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        named = {name for name in self._names.values() if tokenizer.token_to_id(name) is not None}
        return tokenizer if named <= controls else build_tokenizer(self._document, self._folder)

    @cached_property
    def _segment_document(self) -> dict[str, Any]:
        """As _document, without the space before the first word."""
        document = deepcopy(self._document) if self._document.get("pre_tokenizer") else self._document
        return document if never_prepend(document) else self._document

    @cached_property
    def segment(self) -> Tokenizer:
        """For what stands after a control token."""
        different = self._segment_document is not self._document
        return build_tokenizer(self._segment_document, self._folder) if different else self.text

    @cached_property
    def fast_text(self) -> FastTokenizer:
        """As `text`, by a faster library."""
        return FastTokenizer(self._document, self.text, self.dtype)

    @cached_property
    def fast_segment(self) -> FastTokenizer:
        """As `segment`, by a faster library."""
        if self.segment is self.text:
            return self.fast_text
        return FastTokenizer(self._segment_document, self.segment, self.dtype)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a reply: the template's, the document's, and those that the base's own files name."""
        found = {self.special.document_end, self.special.turn_end}
        for name in ("config.json", "generation_config.json"):
            named = read_object_if_there(self._folder / name).get("eos_token_id")
            found |= set(named) if isinstance(named, list) else {named}
        return frozenset(token for token in found if token is not None)

    def encode_texts(self, texts: list[str]) -> TextTokens:
        """The tokens of whole texts."""
        if self._fast:
            return self.fast_text.encode(texts)
        return StockTokens(self.text.encode_batch(texts, add_special_tokens=False), self.dtype)

    def encode_segments(self, texts: list[str]) -> list[list[int]]:
        """The ids of what stands after control tokens."""
        if not self._fast:
            return [encoding.ids for encoding in self.segment.encode_batch_fast(texts, add_special_tokens=False)]
        tokens = self.fast_segment.encode(texts)
        ids, bounds = tokens.ids.tolist(), tokens.offsets.tolist()
        return [ids[start:end] for start, end in pairwise(bounds)]

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of a text whose control tokens are meant, as the tokenizer itself reads them."""
        self.text.encode_special_tokens = False
        try:
            ids: list[int] = self.text.encode(text, add_special_tokens=False).ids
        finally:
            self.text.encode_special_tokens = True
        return ids

    def encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """The ids of the parts of one document, each encoded by itself, the first with the token that begins one."""
        first, *others = self.encode_segments(list(parts))
        return [[self.special.document_start, *first], *others]

    def prove_fast(self) -> bool:
        """Whether the faster library is there, reads this tokenizer, and gives the same ids as the tokenizer itself."""
        try:
            return all(map(agrees, {id(each): each for each in (self.fast_text, self.fast_segment)}.values()))
        except (ImportError, ValueError):
            return False


def parse_tokenizer(text: str, folder: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes.

    Raises:
        ModelError: the library refuses it; a panic of its Rust code, which is no Exception, is a refusal too.
    """
    try:
        return Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = first_words(error)
        raise ModelError(f"{folder / 'tokenizer.json'} holds no tokenizer ({reason}); fetch it again.") from error


def build_tokenizer(document: dict[str, Any], folder: Path) -> Tokenizer:
    """A tokenizer of this description that treats control tokens in text as text."""
    tokenizer = parse_tokenizer(json.dumps(document), folder)
    tokenizer.encode_special_tokens = True
    return tokenizer


def never_prepend(document: dict[str, Any]) -> bool:
    """Turn `first` into `never` wherever Metaspace puts a space before the first word; whether any was."""
    pre_tokenizer = document.get("pre_tokenizer") or {}
    parts = [pre_tokenizer, *pre_tokenizer.get("pretokenizers", [])]
    found = [part for part in parts if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first"]
    for part in found:
        part["prepend_scheme"] = "never"
    return bool(found)


def read_special_names(folder: Path) -> dict[str, str]:
    """The texts of bos, eos, pad, unk and the turn tokens, where the folder names them.

    tokenizer_config.json comes first, then special_tokens_map.json, then the ids of config.json. A file that
    says null means it: the tokenizer has none.
    """
    names = {"turn_start": TURN_START, "turn_end": TURN_END}
    settings = [read_object_if_there(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    config = read_object_if_there(folder / "config.json")
    for kind in ("bos", "eos", "pad", "unk"):
        stated = next((setting for setting in settings if f"{kind}_token" in setting), None)
        if stated is not None:
            text = token_text(stated[f"{kind}_token"])
        else:
            text = token_of_id(folder, config.get(f"{kind}_token_id"))
        if text:
            names[kind] = text
    return names


def read_controls(folder: Path) -> frozenset[str]:
    """The texts of the tokens that no message can write: those flagged special, and those that the folder names."""
    file = folder / "tokenizer.json"
    added = take(read_object(file), "added_tokens", file, list, default=[])
    named = set(read_special_names(folder).values())
    return frozenset(token["content"] for token in added if token["special"] or token["content"] in named)


def token_of_id(folder: Path, ids: Any) -> str | None:
    """The text of the control token that config.json names by its id, or by a list of ids."""
    wanted = ids[0] if isinstance(ids, list) and ids else ids
    if not isinstance(wanted, int):
        return None
    file = folder / "tokenizer.json"
    added = take(read_object_if_there(file), "added_tokens", file, list, default=[])
    return next((token["content"] for token in added if token["id"] == wanted), None)


def token_text(token: Any) -> str | None:
    """The text of a token as tokenizer_config.json writes it: a string or an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def resolve_special_tokens(tokenizer: Tokenizer, names: dict[str, str], folder: Path) -> SpecialTokens:
    """Ids of the named tokens, and those between which a document stands.

    A document stands between the tokenizer's bos and eos, unless these are the tokens of chat turns (as
    in SmolLM2-Instruct): then the end-of-text token that the base was pretrained with stands in.

    Raises:
        ModelError: no token can end a document.
    """
    turn_start, turn_end = tokenizer.token_to_id(TURN_START), tokenizer.token_to_id(TURN_END)
    bos, eos = (tokenizer.token_to_id(names[kind]) if kind in names else None for kind in ("bos", "eos"))
    end_of_text = next((found for text in _END_OF_TEXT if (found := tokenizer.token_to_id(text)) is not None), None)
    if bos is not None and bos == turn_start:
        bos = None
    document_end = eos if eos is not None and eos != turn_end else end_of_text
    if document_end is None:
        document_end = eos
    if document_end is None:
        raise ModelError(
            f"the tokenizer in {folder} names no eos token, so documents cannot end; set eos_token in its "
            "tokenizer_config.json."
        )
    fallback = end_of_text if end_of_text is not None else document_end
    return SpecialTokens(
        bos=bos,
        document_start=bos if bos is not None else fallback,
        document_end=document_end,
        turn_start=turn_start,
        turn_end=turn_end,
    )


def token_characters(encoding: Encoding, text: str) -> tuple[np.ndarray, np.ndarray]:
    """int64 (tokens,) twice: characters and UTF-8 bytes of `text` that each token brings.

    A character of several tokens belongs to the first of them; what no token covers belongs to the last.
    """
    ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
    if not len(ends):
        return ends, ends
    ends = np.maximum.accumulate(ends)
    ends[-1] = len(text)
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    byte_ends = np.concatenate([[0], np.cumsum(widths)])[ends]
    return np.diff(ends, prepend=0), np.diff(byte_ends, prepend=0)
