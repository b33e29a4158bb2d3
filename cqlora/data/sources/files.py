"""Rows out of files, streamed: JSON lines, JSON arrays, Parquet, tables, plain text, each compressed or not."""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cqlora.data.charset import describe_undecodable
from cqlora.data.records import RawRow, RowError
from cqlora.data.sources.location import SourceFile
from cqlora.errors import DataError

MAX_ROW_BYTES = 16 << 20
"""A longer line is no document; it is rejected without being held in memory."""

_CHUNK_CHARACTERS = 1 << 20
_DECODER = json.JSONDecoder()
_SEPARATORS = re.compile(r"[\s,]*")
_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]|[-+.\w]+', re.DOTALL)
"""What an element of a JSON array is made of: strings, brackets, and other values."""
_ESCAPE = re.compile(r"\\[nrt\\]")
_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}
_OPENS_OBJECT = re.compile(r"\s*\[?\s*\{")
_WHO, _WHAT = r"'(?:role|from)'\s*:", r"'(?:content|value)'\s*:"
_PYTHONS_MESSAGES = re.compile(rf"\s*\[?\s*\{{\s*(?:{_WHO}.*{_WHAT}|{_WHAT}.*{_WHO})", re.DOTALL)
"""How a cell begins that holds messages as Python shows them."""
LONG_NUMBER = "number of thousands of digits"
TOO_DEEP = "nested too deeply"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class UnreadableRowError(RowError):
    """Stands in a row's place when the row could be found but not taken."""


def decode_body(body: Any) -> Any:
    """The row as an object.

    Raises:
        RowError: it cannot be decoded.
    """
    if isinstance(body, UnreadableRowError):
        raise body
    if not isinstance(body, bytes):
        return body
    try:
        return json.loads(body)
    except UnicodeDecodeError:
        raise RowError(describe_undecodable(body)) from None
    except json.JSONDecodeError:
        raise RowError("broken JSON") from None
    except RecursionError:
        raise RowError(TOO_DEEP) from None
    except ValueError:
        raise RowError(LONG_NUMBER) from None


def read_json_lines(file: SourceFile) -> Iterator[RawRow]:
    """One row a line, blank lines skipped; a line beyond MAX_ROW_BYTES gives an UnreadableRowError."""
    name = file.path.name
    with open_stream(file.path) as stream:
        line = 0
        while raw := stream.readline(MAX_ROW_BYTES + 1):
            line += 1
            raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if len(raw) > MAX_ROW_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = stream.readline(MAX_ROW_BYTES)
                yield RawRow(name, line, UnreadableRowError(f"line longer than {MAX_ROW_BYTES >> 20} MiB"), file.split)
            elif raw.strip():
                yield RawRow(name, line, raw, file.split)


def read_json(file: SourceFile, rows_are_lists: bool = False) -> Iterator[RawRow]:
    """The elements of a JSON array, or of several one after another, decoded one at a time.

    A file that is no array is read as JSON lines; so is one where each row is a list by itself and the first
    bracket opens such a row.
    """
    with open_stream(file.path) as stream:
        opening = first_characters(stream)
    if not opening.startswith("[") or (rows_are_lists and not opening.startswith("[[")):
        yield from read_json_lines(file)
        return
    with open_stream(file.path) as stream:
        text = ArrayText(io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape"), file.path)
        for line, element in text.elements():
            yield RawRow(file.path.name, line, element, file.split)


def first_characters(stream: IO[bytes]) -> str:
    """The first two characters of a file that are neither white space nor a byte-order mark."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
    found = ""
    while len(found) < 2 and (start := text.read(4096)):
        found += "".join(start.split())[:2]
    return found[:2]


class ArrayText:
    """JSON arrays one after another, of which about one element is held at a time."""

    def __init__(self, stream: IO[str], path: Path) -> None:
        self.stream = stream
        self.path = path
        self.buffer = ""
        self.position = 0
        self.line = 1

    def elements(self) -> Iterator[tuple[int, Any]]:
        """(line, value) of every element; an UnreadableRowError in place of a value that cannot be taken.

        Raises:
            DataError: an array is broken, with the line where it broke; what follows cannot be found again.
        """
        while opening := self.next_character():
            if opening != "[":
                raise self.broken("something that is no array follows the array")
            self.position += 1
            while self.next_character() != "]":
                line = self.line
                yield line, self.take_element()
            self.position += 1

    def next_character(self) -> str:
        """Go on to the next character that is neither white space nor a comma; empty at the end of the file."""
        while True:
            match = _SEPARATORS.match(self.buffer, self.position)
            self.advance(match.end() if match else self.position)
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self.grow():
                return ""

    def advance(self, end: int) -> None:
        """Go on to `end`, counting lines."""
        self.line += self.buffer.count("\n", self.position, end)
        self.position = end

    def grow(self) -> bool:
        """Read on, and forget what lies behind; False at the end of the file."""
        read = self.stream.read(_CHUNK_CHARACTERS)
        if read:
            self.buffer, self.position = self.buffer[self.position :] + read, 0
        return bool(read)

    def take_element(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                if len(self.buffer) - self.position <= MAX_ROW_BYTES and self.grow():
                    continue
                raise self.broken(error.msg) from None
            except (RecursionError, ValueError) as error:
                deep = isinstance(error, RecursionError)
                value, end = UnreadableRowError(TOO_DEEP if deep else LONG_NUMBER), self.find_end()
            if end == len(self.buffer) and self.grow():
                continue
            self.advance(end)
            return value

    def find_end(self) -> int:
        """Where a well-formed element ends that is too much for the decoder."""
        while True:
            depth = 0
            for match in _MARKS.finditer(self.buffer, self.position):
                depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0][0], 0)
                if depth <= 0 and match.end() < len(self.buffer):
                    return match.end()
            if len(self.buffer) - self.position > MAX_ROW_BYTES or not self.grow():
                raise self.broken("it does not end")

    def broken(self, why: str) -> DataError:
        """The error that names the place."""
        return DataError(
            f"{self.path} is broken JSON in the element at line {self.line} ({why}); mend the file or give JSON lines."
        )


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
                for body in rows_of(batch):
                    row += 1
                    yield RawRow(file.path.name, row, body, file.split)
    except (pa.ArrowException, OSError) as error:
        size = file.path.stat().st_size
        raise DataError(
            f"{file.path} is damaged after row {row} of its {size} bytes ({first_line(error)}); fetch it again."
        ) from None


def rows_of(batch: Any) -> list[Any]:
    """The rows of an Arrow batch; an UnreadableRowError in place of one with a value that Python cannot hold."""
    try:
        rows: list[Any] = batch.to_pylist()
    except (ArithmeticError, LookupError, TypeError, ValueError):
        if len(batch) == 1:
            return [UnreadableRowError("value that is not UTF-8 or out of range")]
        middle = len(batch) // 2
        return [*rows_of(batch.slice(0, middle)), *rows_of(batch.slice(middle))]
    return rows


def read_table(file: SourceFile, delimiter: str) -> Iterator[RawRow]:
    """The rows of a table as dictionaries of text, by the names in its first row; empty rows and cells are left out.

    A first row without a `delimiter` may have another one, as spreadsheets write it in some countries. A row with
    another number of cells than the first, or a cell beyond MAX_ROW_BYTES, gives an UnreadableRowError.

    Raises:
        DataError: the first row does not name every column once, or a quote is not closed or not at a cell's end.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    with open_stream(file.path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        first = text.readline()
        table = TableLines(first, text, sniff_delimiter(first, delimiter))
        try:
            head = table.take_row() or []
            names = [""] if isinstance(head, UnreadableRowError) else [name.strip() for name in head]
            if not all(names) or len(set(names)) < len(names):
                raise DataError(f"{file.path} has a first row that does not name every column once; name them there.")
            while (cells := table.take_row()) is not None:
                if isinstance(cells, UnreadableRowError) or any(cells):
                    yield RawRow(file.path.name, table.begin, name_cells(names, cells), file.split)
        except csv.Error as error:
            raise DataError(
                f"{file.path} is no table from line {table.line} on ({first_line(error)}); mend its quotes."
            ) from None


def sniff_delimiter(first: str, usual: str) -> str:
    """What stands between the names in a table's first row: the usual, unless another does and the usual does not."""
    return usual if usual in first else next((other for other in (";", "\t", ",") if other in first), usual)


class TableLines:
    """A table's lines, of which those of the row that is being taken are held."""

    def __init__(self, first: str, rest: Iterator[str], delimiter: str) -> None:
        self.lines = itertools.chain([first] if first else [], rest)
        self.delimiter = delimiter
        self.held: list[str] = []
        self.line = self.begin = 0
        """The last line that was read, and the first of the row."""
        # Strict: a quote that is not closed, or closed within a cell, would swallow rows or vanish.
        self.reader = csv.reader(self, delimiter=delimiter, strict=True)

    def __iter__(self) -> "TableLines":
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.line += 1
        self.held.append(line)
        return line

    def take_row(self) -> list[str] | UnreadableRowError | None:
        """The next row's cells; None at the end; an error in place of a row with a cell that is too long."""
        self.held, self.begin = [], self.line + 1
        try:
            return next(self.reader, None)
        except csv.Error as error:
            if "field larger" not in str(error):
                raise
            self.skip_row()
            return UnreadableRowError(f"cell longer than {MAX_ROW_BYTES >> 20} MiB")

    def skip_row(self) -> None:
        """Read on to the end of the row that was given up.

        Raises:
            csv.Error: the table ends before the row does.
        """
        quoted = ends_quoted("".join(self.held), self.delimiter)
        while quoted:
            self.held = []
            line = next(self, None)
            if line is None:
                raise csv.Error("unexpected end of data")
            quoted = ends_quoted(line, self.delimiter, quoted)


def ends_quoted(text: str, delimiter: str, quoted: bool = False) -> bool:
    """Whether a part of a row, which begins within quotes or at a cell's start, ends within quotes.

    Raises:
        csv.Error: something else than another cell follows a quote: it was never meant to close the first one.
    """
    place = 0
    while place < len(text):
        if not quoted and text[place] == '"':
            quoted, place = True, place + 1
        elif quoted:
            end = text.find('"', place)
            if end < 0:
                return True
            behind = text[end + 1 : end + 2]
            if behind not in ('"', delimiter, "\r", "\n", ""):
                raise csv.Error(f"{behind!r} behind a quote")
            doubled = behind == '"'
            quoted, place = doubled, end + 2 if doubled else end + 1
        if not quoted:
            start = text.find(delimiter, place)
            if start < 0:
                return False
            place = start + 1
    return quoted


def name_cells(names: list[str], cells: list[str] | UnreadableRowError) -> Any:
    """A row's cells that hold something, by their columns' names; an UnreadableRowError where there are others."""
    if isinstance(cells, UnreadableRowError):
        return cells
    if len(cells) != len(names):
        return UnreadableRowError(f"{len(cells)} cells where the first row has {len(names)}")
    try:
        return {name: open_cell(cell) for name, cell in zip(names, cells, strict=True) if cell}
    except UnreadableRowError as error:
        return error


def open_cell(cell: str) -> Any:
    """A cell's text; the messages that it holds, where it is the JSON of some, or of one. Other JSON stays text.

    Raises:
        UnreadableRowError: it holds messages in Python's notation, as pandas writes lists.
    """
    if not _OPENS_OBJECT.match(cell):
        return cell
    if _PYTHONS_MESSAGES.match(cell):
        raise UnreadableRowError("cell of messages in Python's notation, not JSON")
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    messages = found if isinstance(found, list) else [found]
    return found if messages and all(map(is_message, messages)) else cell


def is_message(value: Any) -> bool:
    """Whether a value says who speaks, and what."""
    return (
        isinstance(value, dict) and bool({"role", "from"} & value.keys()) and bool({"content", "value"} & value.keys())
    )


def read_text(file: SourceFile, separator: str) -> Iterator[RawRow]:
    """Documents of a plain file: the whole file, or what stands between two separators.

    A separator may say `\\n`, `\\r`, `\\t` and `\\\\`, as a command line and YAML without double quotes hand them on.
    """
    name = file.path.name
    separator = _ESCAPE.sub(lambda match: _ESCAPES[match[0]], separator)
    with open_stream(file.path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=None)
        line, buffer = 1, ""
        while chunk := text.read(_CHUNK_CHARACTERS):
            *documents, buffer = (buffer + chunk).split(separator) if separator else (buffer + chunk,)
            for document in documents:
                if document.strip():
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
            if path.suffix.lower() not in COMPRESSED:
                raise
            raise DataError(
                f"{path} is damaged or cut short near byte {raw.tell()} of {path.stat().st_size} "
                f"({first_line(error)}); fetch it again."
            ) from None


def decompress(raw: IO[bytes], path: Path) -> IO[bytes]:
    """A buffered reader over the decompressed bytes of `raw`."""
    match path.suffix.lower():
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
