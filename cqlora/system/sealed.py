"""Small JSON documents that know their own sha256, so that a damaged one is not believed."""

import hashlib
import json
from pathlib import Path
from typing import Any

SEAL = "sha256_of_the_rest"


def seal_document(document: dict[str, Any]) -> bytes:
    """The document as JSON that people can read, with the sha256 of what it says."""
    sealed = {**document, SEAL: _digest(document)}
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
    return document if seal == _digest(document) else None


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
