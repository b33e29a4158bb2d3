"""What a base model's folder says of itself, read without torch: shape, tokenizer, added rows, fingerprints."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqlora.architectures import ties_embeddings
from cqlora.errors import ModelError
from cqlora.system.companions import hash_companions, refuse_changed
from cqlora.system.documents import read_object, read_object_if_there, shorten, take, take_number, write_json
from cqlora.system.fingerprints import VERSION, combine, hash_tensors, hash_whole
from cqlora.system.model_config import check_config, check_tensors
from cqlora.system.sealed import hash_document
from cqlora.system.tensor_files import read_tensors

CARD = "cqlora.json"
"""Beside a base that cqlora wrote: which rows were added. Beside an adapter: what it was trained on."""
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
README = "README.md"
"""The model card that people read, beside either."""
_SEAL = "card_sha256"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_ADAPTER_DIGESTS = {"adapter_sha256": ADAPTER_WEIGHTS, "adapter_config_sha256": ADAPTER_CONFIG}


@dataclass(frozen=True, slots=True)
class Base:
    """A base model folder in Hugging Face form."""

    path: Path
    config: dict[str, Any]
    """`config.json`."""
    tokenizer_file: Path
    first_added_row: int | None
    """First row of the embedding that an extension added; None on a base that is not extended."""
    added_rows: int
    """Rows that an extension added and tokens use (padding rows are not among them)."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix, padding rows included."""
        return int(self.config["vocab_size"])

    @property
    def added(self) -> range:
        """Rows of the embedding that an extension added and tokens use; empty on a base that is not extended."""
        first = self.first_added_row or 0
        return range(first, first + self.added_rows)

    @property
    def tied(self) -> bool:
        """Whether input and output share one embedding matrix."""
        return ties_embeddings(self.config)


def read_base(path: str | Path) -> Base:
    """Read a base folder's own description, and check that configuration, tensors and tokenizer are of one model.

    Raises:
        ModelError: the folder, its config.json, its weights or its tokenizer.json is missing, damaged, or does not
            belong to the others.
    """
    folder = Path(path)
    if not folder.is_dir():
        made = "`cqlora fetch`" if folder.name == "smollm2_135m" else "`cqlora convert` from raw weights"
        raise ModelError(
            f"model folder {folder} does not exist; give a folder in Hugging Face form, or make it with {made} first."
        )
    config_file, tokenizer_file = folder / "config.json", folder / "tokenizer.json"
    for file, what in ((config_file, "model"), (tokenizer_file, "tokenizer")):
        if not os.path.lexists(file):
            raise ModelError(
                f"{folder} has no {file.name}, so it holds no Hugging Face {what}; give the folder of a "
                "converted model (`cqlora convert`)."
            )
    config = read_object(config_file)
    check_config(config, config_file)
    check_tensors(config, {name: tensor.shape for name, tensor in read_tensors(folder).items()}, folder)
    check_token_ids(tokenizer_file, config["vocab_size"])
    first, added = read_added_rows(folder, config["vocab_size"])
    return Base(folder, config, tokenizer_file, first, added)


def read_added_rows(folder: Path, rows: int) -> tuple[int | None, int]:
    """First row that an extension added and how many tokens use, as the folder's card says; None and 0 without one.

    Raises:
        ModelError: the card is damaged, or names rows that the embedding does not have.
    """
    card, file = read_card(folder), folder / CARD
    added = take_number(card, "added_rows", file, 0, rows, default=0)
    first = take_number(card, "first_added_row", file, 0, rows - added, default=None)
    return first, added if first is not None else 0


def check_token_ids(tokenizer_file: Path, rows: int) -> None:
    """Refuse a tokenizer with an id that no row of the embedding stands for; a text with it would end the process.

    Raises:
        ModelError: such an id, or a file that is no tokenizer.
    """
    token, token_id = max(read_token_ids(tokenizer_file).items(), key=lambda item: item[1], default=("", -1))
    if token_id >= rows:
        raise ModelError(
            f"{tokenizer_file} gives {shorten(token)} the id {token_id:,} and the model has {rows:,} rows for tokens; "
            "give the tokenizer that belongs to the weights."
        )


def read_token_ids(tokenizer_file: Path) -> dict[str, int]:
    """Every token of a tokenizer.json and its id.

    Raises:
        ModelError: the file is damaged or holds something else.
    """
    document = read_object(tokenizer_file)
    vocab = take(take(document, "model", tokenizer_file, dict, {}), "vocab", tokenizer_file, (dict, list), {})
    if isinstance(vocab, list):
        pieces = [piece[0] if isinstance(piece, list) and piece else None for piece in vocab]
        ids = {piece: number for number, piece in enumerate(pieces) if isinstance(piece, str)}
    else:
        ids = dict(vocab)
    for token in take(document, "added_tokens", tokenizer_file, list, default=[]):
        if not isinstance(token, dict):
            raise ModelError(f"{tokenizer_file} has added_tokens that are no objects; fetch it again.")
        take(token, "special", tokenizer_file, bool)
        ids[take(token, "content", tokenizer_file, str)] = take(token, "id", tokenizer_file, int)
    for token, token_id in ids.items():
        if type(token_id) is not int or token_id < 0:
            raise ModelError(f"{tokenizer_file} gives {shorten(token)} the id {shorten(token_id)}; fetch it again.")
    return ids


def read_card(folder: Path) -> dict[str, Any]:
    """The folder's cqlora.json, or nothing where there is none.

    Raises:
        ModelError: it is damaged, or was changed since it was sealed.
    """
    file = folder / CARD
    card = read_object_if_there(file)
    seal = card.pop(_SEAL, None)
    if seal is not None and seal != hash_document(card):
        raise ModelError(
            f"{file} is not as it was written; restore it, or remove {_SEAL} from it if you changed it yourself."
        )
    return card


def seal_card(folder: Path, card: dict[str, Any]) -> None:
    """Write cqlora.json with digests of itself and of an adapter's two files or a base's companions beside it."""
    card = {key: value for key, value in card.items() if key != _SEAL}
    for key, name in _ADAPTER_DIGESTS.items():
        if (folder / name).is_file():
            card[key] = hash_whole(folder / name)
    if (folder / "tokenizer.json").is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
        card["companions"] = hash_companions(folder)
    write_json(folder / CARD, seal(card))


def seal(card: dict[str, Any]) -> dict[str, Any]:
    """A card with the digest of what it says."""
    return card | {_SEAL: hash_document(card)}


def verify_adapter(folder: Path) -> None:
    """Compare an adapter's files with the digests in its card; one without a card has nothing to compare with.

    Raises:
        ModelError: a file is not the one that the card was written for.
    """
    card = read_card(folder)
    for key, name in _ADAPTER_DIGESTS.items():
        if key in card and hash_whole(folder / name) != card[key]:
            raise ModelError(
                f"{folder / name} is not the file that its {CARD} was written for; restore it, or remove {CARD} to use "
                "the adapter unchecked."
            )


def check_companions(base: Path, card_of: Path, remedy: str, accepted: Sequence[str] = ()) -> None:
    """Compare a base's companions with what a card says of them: its own, or that of an adapter trained on it.

    Raises:
        ModelError: one was changed and is not accepted; `remedy` is UNSEAL, or ACCEPT with its key.
    """
    card, file = read_card(card_of), card_of / CARD
    known = take(card, "companions", file, dict, default={})
    refuse_changed(base, known, f"when {file} was written", remedy.replace("{card}", str(file)), accepted)


def fingerprint_adapter(folder: Path) -> str:
    """sha256 of an adapter's weights, by which cards name it."""
    return hash_whole(folder / ADAPTER_WEIGHTS)


def fingerprint_tokenizer(folder: Path) -> str:
    """The fingerprint of what decides token ids: tokenizer.json, by meaning, and the names of the special tokens.

    Raises:
        ModelError: a file is damaged, or the folder's card says another fingerprint.
    """
    document = read_object(folder / "tokenizer.json")
    for key in ("truncation", "padding"):
        document.pop(key, None)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = read_object_if_there(folder / name)
        document[name] = {key: _token_text(settings[key]) for key in _SPECIAL if key in settings}
    return _check_stated(folder, "tokenizer_sha256", VERSION + hash_document(document), "tokenizer")


def fingerprint_weights(folder: Path) -> str:
    """The fingerprint of what decides a model's numbers: config.json and every byte of every tensor.

    Reads all of the weights, unless they are remembered (system/fingerprints).

    Raises:
        ModelError: a file is damaged, or the folder's card says another fingerprint.
    """
    tensors = read_tensors(folder)
    found = combine(read_object(folder / "config.json"), tensors.values(), hash_tensors(tensors.values()))
    return _check_stated(folder, "weights_sha256", found, "config.json or weights")


def _check_stated(folder: Path, key: str, found: str, what: str) -> str:
    """The fingerprint that was found, which must be the one that a base's own card states."""
    stated = read_card(folder).get(key)
    if isinstance(stated, str) and stated.startswith(VERSION) and stated != found:
        raise ModelError(
            f"{folder}: {what} changed since {CARD} was written; fetch or convert the model again, or remove {key} and "
            f"{_SEAL} from {CARD} if the change is meant."
        )
    return found


def _token_text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
