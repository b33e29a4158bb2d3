"""tiktoken as both kinds of faster encoder use it: texts to ranks, as arrays."""

from typing import Any

import numpy as np

_NEVER = "<|no control token|>"
"""tiktoken looks for a control token in every text, and an empty list of them would match everywhere; this one is
allowed nowhere, so that text that holds it is text."""


def open_encoding(pattern: str, ranks: dict[bytes, int]) -> Any:
    """A tiktoken encoding that cuts text into words by `pattern`.

    Raises:
        ImportError: tiktoken is not installed.
    """
    import tiktoken

    return tiktoken.Encoding("bulk", pat_str=pattern, mergeable_ranks=ranks, special_tokens={_NEVER: len(ranks)})


def encode_ranks(encoding: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """int64 (ranks,) of all texts, and (texts + 1,) where each text's begin; never a list of Python's numbers."""
    found = [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
    offsets = np.cumsum([0, *map(len, found)])
    return np.concatenate(found, dtype=np.int64) if found else np.zeros(0, dtype=np.int64), offsets
