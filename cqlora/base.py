"""What a base model's folder says of itself, read without torch: shape, tokenizer, added rows, fingerprints."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqlora.errors import ModelError

CARD = "cqlora.json"
"""Beside a base that cqlora wrote: which rows were added. Beside an adapter: what it was trained on."""


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
    def tied(self) -> bool:
        """Whether input and output share one embedding matrix."""
        return bool(self.config.get("tie_word_embeddings", False))


def read_base(path: str | Path) -> Base:
    """Read a base folder's own description.

    Raises:
        ModelError: the folder, its config.json, its weights or its tokenizer.json is missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        hint = "`cqlora fetch`" if folder.name == "smollm2_135m" else "`cqlora convert`"
        raise ModelError(f"model folder {folder} does not exist; make it with {hint} first.")
    config_file, tokenizer_file = folder / "config.json", folder / "tokenizer.json"
    for file, what in ((config_file, "model"), (tokenizer_file, "tokenizer")):
        if not file.is_file():
            raise ModelError(
                f"{folder} has no {file.name}, so it holds no Hugging Face {what}; give the folder of a "
                "converted model (`cqlora convert`)."
            )
    if not list_weight_files(folder):
        raise ModelError(
            f"{folder} has no *.safetensors, so it holds no weights; give the folder of a converted model."
        )
    card = read_card(folder)
    return Base(
        path=folder,
        config=json.loads(config_file.read_text(encoding="utf-8")),
        tokenizer_file=tokenizer_file,
        first_added_row=card.get("first_added_row"),
        added_rows=int(card.get("added_rows", 0)),
    )


def read_card(folder: Path) -> dict[str, Any]:
    """The folder's cqlora.json, or nothing where there is none."""
    file = folder / CARD
    if not file.is_file():
        return {}
    card: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return card


def write_json(file: Path, document: object) -> None:
    """Write JSON as people read it."""
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def list_weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, in the order of their names."""
    return sorted(folder.glob("*.safetensors"))


def fingerprint_tokenizer(folder: Path) -> str:
    """sha256 of what decides token ids: tokenizer.json, by meaning and not by white space."""
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for key in ("truncation", "padding"):
        document.pop(key, None)
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def fingerprint_weights(folder: Path) -> str:
    """sha256 over each weight file's name, size, header and samples of its bytes.

    Reading 130 GB to know a 65B model again would cost minutes at every start; 64 samples of 4 KiB per
    file, evenly spaced, tell two models apart all the same.
    """
    digest = hashlib.sha256()
    for file in list_weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(header_bytes))
            for sample in range(64):
                stream.seek(8 + header_bytes + (size - 8 - header_bytes) * sample // 64)
                digest.update(stream.read(4096))
    return digest.hexdigest()
