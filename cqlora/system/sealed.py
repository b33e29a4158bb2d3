"""sha256 of files and JSON documents, and documents that know their own, so that a damaged one is not believed."""

import hashlib
import json
from pathlib import Path
from typing import Any

SEAL = "sha256_of_the_rest"


def seal_document(document: dict[str, Any]) -> bytes:
    """The document as JSON that people can read, with the sha256 of what it says."""
    sealed = {**document, SEAL: hash_document(document)}
    return (json.dumps(sealed, indent=2, ensure_ascii=False) + "\n").encode()


def read_sealed(file: Path) -> dict[str, Any] | None:
    """The document in `file`; None where there is none that is as it was written."""
    try:
        document = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    seal = document.pop(SEAL, None)
    return document if seal == hash_document(document) else None


def hash_document(document: object) -> str:
    """sha256 of a JSON document, whatever its white space and the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def hash_file(file: Path) -> str:
    """sha256 of a file, read in blocks."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
