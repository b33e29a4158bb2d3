"""Hashes that decide, alike on every machine, which texts are held out, sampled or equal."""

import hashlib

import numpy as np

_SPACES = b"\t\n\v\f\r\x1c\x1d\x1e\x1f "
_WIDE_SPACES = ("\u3000".encode(), "\u00a0".encode())
_SMALL = bytes(range(256)).lower()


def content_key(text: str) -> int:
    """64 bits of a text regardless of case and white space, see fold_text."""
    return int.from_bytes(hashlib.blake2b(fold_text(text), digest_size=8).digest(), "little")


def fold_text(text: str) -> bytes:
    """UTF-8 of the text without white space, and without the case of the letters A to Z.

    Cleaning has already made widths and compositions alike.
    """
    folded = text.encode("utf-8", "surrogatepass").translate(_SMALL, _SPACES)
    for space in _WIDE_SPACES:
        folded = folded.replace(space, b"")
    return folded


def mix_keys(keys: np.ndarray, salt: str, seed: int = 0) -> np.ndarray:
    """uint64, as `keys`: each key hashed anew for one purpose (splitmix64's finaliser)."""
    digest = hashlib.blake2b(f"{salt}:{seed}".encode(), digest_size=8).digest()
    mixed = keys.astype(np.uint64) ^ np.uint64(int.from_bytes(digest, "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def fractions(keys: np.ndarray) -> np.ndarray:
    """float64 in [0, 1), as `keys`: evenly spread, for comparing with a share."""
    return (keys >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def assign_splits(keys: np.ndarray, val_fraction: float, test_fraction: float) -> np.ndarray:
    """uint8, as `keys`: 0 train, 1 val, 2 test. Neither seed nor neighbours matter, only the document."""
    draw = fractions(mix_keys(keys, "held-out"))
    splits = np.zeros(keys.shape, dtype=np.uint8)
    splits[draw < val_fraction + test_fraction] = 2
    splits[draw < val_fraction] = 1
    return splits
