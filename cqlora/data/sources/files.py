"""Rows out of files, streamed: JSON lines, JSON arrays, Parquet, plain text, each compressed or not."""

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cqlora.data.records import RawRow, RowError
from cqlora.data.sources.location import SourceFile
from cqlora.errors import DataError

MAX_ROW_BYTES = 16 << 20
"""A longer line is no document; it is rejected without being held in memory."""

_CHUNK_CHARACTERS = 1 << 20
_SEPARATORS = re.compile(r"[\s,]*")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class UnreadableRowError(RowError):
    """Stands in a row's place when the row could be found but not taken."""


def read_json_lines(file: SourceFile) -> Iterator[RawRow]:
    """One row a line, blank lines skipped; a line beyond MAX_ROW_BYTES gives an UnreadableRowError."""
    name = file.path.name
    with open_stream(file.path) as stream:
        line = 0
        while raw := stream.readline(MAX_ROW_BYTES + 1):
            line += 1
            if len(raw) > MAX_ROW_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = stream.readline(MAX_ROW_BYTES)
                yield RawRow(name, line, UnreadableRowError(f"line longer than {MAX_ROW_BYTES >> 20} MiB"), file.split)
            elif raw.strip():
                yield RawRow(name, line, raw, file.split)


def read_json(file: SourceFile) -> Iterator[RawRow]:
    """The elements of a JSON array, decoded one at a time; a file that is no array is read as JSON lines."""
    with open_stream(file.path) as stream:
        first = stream.read(4096).lstrip()[:1]
    if first != b"[":
        yield from read_json_lines(file)
        return
    with open_stream(file.path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
        for line, element in decode_array(text, file.path):
            yield RawRow(file.path.name, line, element, file.split)


def decode_array(stream: IO[str], path: Path) -> Iterator[tuple[int, Any]]:
    """The (line, value) pairs of a JSON array, holding about one element at a time.

    Raises:
        DataError: the array is broken, with the line where it broke; what follows cannot be found again.
    """
    decoder = json.JSONDecoder()
    buffer, line, ended = stream.read(_CHUNK_CHARACTERS), 1, False
    position = buffer.index("[") + 1
    while True:
        start = skip_separators(buffer, position)
        line += buffer.count("\n", position, start)
        position = start
        if buffer.startswith("]", position):
            return
        try:
            value, end = decoder.raw_decode(buffer, position)
        except json.JSONDecodeError as error:
            chunk = "" if ended else stream.read(_CHUNK_CHARACTERS)
            ended = not chunk
            if ended or len(buffer) - position > MAX_ROW_BYTES:
                raise DataError(
                    f"{path} is broken JSON in the element at line {line} ({error.msg}); "
                    "mend the file or give JSON lines."
                ) from None
            buffer, position = buffer[position:] + chunk, 0
            continue
        yield line, value
        line += buffer.count("\n", position, end)
        position = end


def skip_separators(text: str, position: int) -> int:
    """Where the next element begins: after white space and commas."""
    match = _SEPARATORS.match(text, position)
    return match.end() if match else position


def read_parquet(file: SourceFile) -> Iterator[RawRow]:
    """The rows of a Parquet file as dictionaries, a few hundred at a time.

    Raises:
        DataError: the file is damaged, with the row where it broke.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{file.path} needs pyarrow; install it with `pip install cqlora[data]`.") from None
    row = 0
    try:
        with pq.ParquetFile(file.path, memory_map=True) as table:
            for batch in table.iter_batches(batch_size=256):
                for body in batch.to_pylist():
                    row += 1
                    yield RawRow(file.path.name, row, body, file.split)
    except (pa.ArrowException, OSError) as error:
        size = file.path.stat().st_size
        raise DataError(
            f"{file.path} is damaged after row {row} of its {size} bytes ({first_line(error)}); fetch it again."
        ) from None


def read_text(file: SourceFile, separator: str) -> Iterator[RawRow]:
    """Documents of a plain file: the whole file, or what stands between two separators."""
    name = file.path.name
    with open_stream(file.path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=None)
        line, buffer = 1, ""
        while chunk := text.read(_CHUNK_CHARACTERS):
            *documents, buffer = (buffer + chunk).split(separator) if separator else (buffer + chunk,)
            for document in documents:
                yield RawRow(name, line, {"text": document}, file.split)
                line += document.count("\n") + separator.count("\n")
            if len(buffer) > MAX_ROW_BYTES:
                raise DataError(
                    f"{file.path} has a document above {MAX_ROW_BYTES >> 20} MiB at line {line}; "
                    "give data.sources.NAME.separator=TEXT, what stands between two of its documents."
                )
        if buffer.strip():
            yield RawRow(name, line, {"text": buffer}, file.split)


@contextmanager
def open_stream(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed by its suffix.

    Raises:
        DataError: compressed data that ends early or is damaged, with the offset in the file.
    """
    with path.open("rb") as raw:
        try:
            yield decompress(raw, path)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if path.suffix not in _COMPRESSED:
                raise
            raise DataError(
                f"{path} is damaged or cut short near byte {raw.tell()} of {path.stat().st_size} "
                f"({first_line(error)}); fetch it again."
            ) from None


def decompress(raw: IO[bytes], path: Path) -> IO[bytes]:
    """A buffered reader over the decompressed bytes of `raw`."""
    match path.suffix:
        case ".gz":
            return io.BufferedReader(gzip.GzipFile(fileobj=raw))
        case ".bz2":
            return io.BufferedReader(bz2.BZ2File(raw))
        case ".xz":
            return io.BufferedReader(lzma.LZMAFile(raw))
        case ".zst":
            return decompress_zst(raw, path)
    return raw


def decompress_zst(raw: IO[bytes], path: Path) -> IO[bytes]:
    """As decompress, for Zstandard, by Arrow: it notices a stream that was cut short."""
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"{path} needs pyarrow; install it with `pip install cqlora[data]`.") from None
    return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))


def first_line(error: Exception) -> str:
    """The error's message, shortened to one line without its full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120].rstrip(".")
