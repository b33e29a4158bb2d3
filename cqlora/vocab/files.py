"""A tokenizer as files: `tokenizer.json`, `tokenizer_config.json`, for SentencePiece `tokenizer.model`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from cqlora.base import read_token_ids
from cqlora.data.tokenizer import parse_tokenizer
from cqlora.errors import ModelError
from cqlora.system.documents import copy_inside, read_object, read_object_if_there

PIECE_MODEL = "tokenizer.model"
_OTHER_FILES = ("chat_template.jinja",)


@dataclass(slots=True)
class TokenizerFiles:
    """What is in the files, to be changed and written again."""

    folder: Path
    document: dict[str, Any]
    """`tokenizer.json`."""
    settings: dict[str, Any]
    """`tokenizer_config.json`."""
    pieces: Any
    """The SentencePiece ModelProto; None for a byte-level BPE."""

    @property
    def size(self) -> int:
        """Ids in use, from 0 to the highest."""
        added = [token["id"] for token in self.document["added_tokens"]]
        return int(max([*self.vocab.values(), *added])) + 1

    @property
    def vocab(self) -> dict[str, int]:
        """Ids of the pieces that text is segmented into."""
        vocab: dict[str, int] = self.document["model"]["vocab"]
        return vocab

    def build(self) -> Tokenizer:
        """The tokenizer, treating control tokens in text as text."""
        tokenizer = parse_tokenizer(json.dumps(self.document), self.folder)
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def write(self, folder: Path) -> None:
        """Write the files into a folder, with what else of the tokenizer the old one holds."""
        for name, document in (("tokenizer.json", self.document), ("tokenizer_config.json", self.settings)):
            text = json.dumps(document, ensure_ascii=False, indent=2)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        if self.pieces is not None:
            (folder / PIECE_MODEL).write_bytes(self.pieces.SerializeToString())
        for name in _OTHER_FILES:
            if (self.folder / name).is_file() and self.folder != folder:
                copy_inside(self.folder / name, folder / name)


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read a model folder's tokenizer.

    Raises:
        ModelError: neither a byte-level BPE nor a SentencePiece BPE with its tokenizer.model.
    """
    read_token_ids(folder / "tokenizer.json")
    document = read_object(folder / "tokenizer.json")
    # Whatever the library takes has the form that is read below.
    parse_tokenizer(json.dumps(document), folder)
    if document["model"]["type"] != "BPE":
        raise ModelError(
            f"{folder} has a tokenizer of type {document['model']['type']}; only the BPE tokenizers of "
            "LLaMA models can be extended."
        )
    settings = read_object_if_there(folder / "tokenizer_config.json")
    pieces = None if is_byte_level(document) else read_piece_model(folder / PIECE_MODEL)
    files = TokenizerFiles(folder, document, settings, pieces)
    if pieces is not None:
        _adopt_added_tokens(files)
    return files


def read_piece_model(file: Path) -> Any:
    """A SentencePiece ModelProto.

    Raises:
        ModelError: the file is missing or is no SentencePiece model.
    """
    if not file.is_file():
        raise ModelError(f"{file} does not exist; give the SentencePiece model that belongs to the tokenizer.")
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:
        raise ModelError(f"{file} is no SentencePiece model ({error}); give a *.model file.") from error
    if not proto.pieces:
        raise ModelError(f"{file} is no SentencePiece model (it holds no pieces); give a *.model file.")
    return proto


def is_byte_level(document: dict[str, Any]) -> bool:
    """Whether a tokenizer maps text to bytes before it merges."""
    pre_tokenizer = document.get("pre_tokenizer") or {}
    parts = [pre_tokenizer, *pre_tokenizer.get("pretokenizers", [])]
    return any(part.get("type") == "ByteLevel" for part in parts)


def _adopt_added_tokens(files: TokenizerFiles) -> None:
    """Give tokens that were added behind a SentencePiece model their place in it, so that ids agree."""
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    added = {token["id"]: token["content"] for token in files.document["added_tokens"]}
    for token_id in range(len(files.pieces.pieces), files.size):
        if token_id not in added:
            raise ModelError(
                f"{files.folder}'s tokenizer.json has a piece of id {token_id} that its {PIECE_MODEL} lacks; "
                "put the tokenizer.model that it was made from there."
            )
        files.pieces.pieces.append(kinds(piece=added[token_id], score=0.0, type=kinds.CONTROL))
