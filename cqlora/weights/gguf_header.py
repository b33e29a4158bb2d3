"""Check a GGUF file's header in bounded time: every count is compared with the bytes that are left for it.

The `gguf` package takes a count as it stands, and a damaged one of 2^40 is hours of work. Format: ggml's docs/gguf.md.
"""

import mmap
from pathlib import Path

_MAGIC, _STRING, _ARRAY = b"GGUF", 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type's number; the two others have a length of their own."""
_MAX_DIMENSIONS, _MAX_DEPTH = 8, 4


def check_header(file: Path) -> None:
    """Walk over the header of a GGUF file.

    Raises:
        ValueError: it promises more than the file holds, or is no such header.
        OSError: the file cannot be read.
    """
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        walk = _Walk(data)
        walk.skip(8)
        tensors, fields = walk.number(8), walk.number(8)
        for _ in range(walk.within(fields, 8 + 4 + 1)):
            walk.string()
            walk.value(walk.number(4), 0)
        for _ in range(walk.within(tensors, 8 + 4 + 4 + 8)):
            walk.string()
            dimensions = walk.number(4)
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            walk.skip(8 * dimensions + 4 + 8)


class _Walk:
    """A place in the header."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def skip(self, count: int) -> None:
        """Go on by `count` bytes, which must be there."""
        self.within(count, 1)
        self.place += count

    def number(self, size: int) -> int:
        """A whole number of `size` bytes."""
        start = self.place
        self.skip(size)
        return int.from_bytes(self.data[start : self.place], "little")

    def within(self, count: int, size: int) -> int:
        """`count`, if there is room for so many things of at least `size` bytes."""
        if count * size > len(self.data) - self.place:
            raise ValueError(
                f"its header promises {count:,} things where {len(self.data) - self.place:,} bytes are left"
            )
        return count

    def string(self) -> None:
        """Go over a text."""
        self.skip(self.number(8))

    def value(self, kind: int, depth: int) -> None:
        """Go over a value of a kind."""
        if kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _STRING:
            self.string()
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            inner, count = self.number(4), self.number(8)
            if inner in _SIZES:
                self.skip(self.within(count, _SIZES[inner]) * _SIZES[inner])
                return
            for _ in range(self.within(count, 8)):
                self.value(inner, depth + 1)
        else:
            raise ValueError(f"a value of the unknown type {kind}")
