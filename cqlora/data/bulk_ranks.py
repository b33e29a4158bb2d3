"""tiktoken as both kinds of faster encoder use it: text to ranks, as an array."""

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


def encode_ranks(encoding: Any, text: str) -> np.ndarray:
    """uint32 (tokens,): the ranks of a text, never a list of Python's numbers."""
    ranks: np.ndarray = encoding.encode_to_numpy(text, disallowed_special=())
    return ranks
