"""Token ids back to text as they come: whole characters only, nothing of a stop string."""

import codecs
import json
from pathlib import Path
from typing import Any

from cqlora.data.byte_level import piece_bytes
from cqlora.errors import ModelError


class TokenBytes:
    """The UTF-8 bytes that each token stands for; control tokens stand for none.

    `tokenizers` decodes whole sequences only, and shows an unfinished character as U+FFFD, which a model may
    also mean. Bytes tell the two apart.
    """

    def __init__(self, folder: Path) -> None:
        """Read the folder's tokenizer.json.

        Raises:
            ModelError: tokens that are neither byte-level nor SentencePiece's.
        """
        document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        decoders = _decoder_types(document.get("decoder") or {})
        self._byte_level = "ByteLevel" in decoders
        if {"ByteLevel", "ByteFallback", "Metaspace"}.isdisjoint(decoders):
            raise ModelError(
                f"the tokenizer in {folder} decodes by {', '.join(decoders) or 'nothing'}; the engine reads byte-level "
                "BPE and SentencePiece tokenizers, so convert the model with one of these."
            )
        vocabulary = document["model"]["vocab"]
        self._pieces: dict[int, str] = {id: piece for piece, id in vocabulary.items()}
        self._added = {
            token["id"]: b"" if token["special"] else token["content"].encode()
            for token in document.get("added_tokens") or []
        }

    def __call__(self, token: int) -> bytes:
        """Bytes of one token; none for a control token or a padding row of the matrix."""
        if token in self._added:
            return self._added[token]
        piece = self._pieces.get(token)
        return b"" if piece is None else piece_bytes(piece, self._byte_level)


class ReplyText:
    """The text of one reply, grown a token at a time."""

    def __init__(self, token_bytes: TokenBytes, stop: tuple[str, ...]) -> None:
        self.stopped = False
        """Whether a stop string was reached; nothing follows it."""
        self._token_bytes = token_bytes
        self._stop = stop
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def add(self, token: int) -> str:
        """The characters that this token completes and that cannot begin a stop string any more."""
        return self._release(self._characters.decode(self._token_bytes(token)))

    def finish(self) -> str:
        """What was still held back as the beginning of a stop string; bytes of half a character are left out."""
        if self.stopped:
            return ""
        text, self._held = self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        released, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return released


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _decoder_types(decoder: dict[str, Any]) -> list[str]:
    return [part["type"] for part in [*decoder.get("decoders", []), decoder] if "type" in part]
