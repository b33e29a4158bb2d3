"""Rows out of files of every format, compressed or not, and what becomes of damaged ones."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from cqlora.data.records import RawRow
from cqlora.data.sources import files
from cqlora.data.sources.files import (
    UnreadableRowError,
    read_json,
    read_json_lines,
    read_parquet,
    read_table,
    read_text,
)
from cqlora.data.sources.location import SourceFile
from cqlora.errors import DataError

ROWS = [{"id": str(n), "text": f"第 {n} 行 {n * 7919}"} for n in range(3000)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    pa = pytest.importorskip("pyarrow")
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def bodies(rows: Any) -> list[Any]:
    return [json.loads(row.body) if isinstance(row.body, bytes) else row.body for row in rows]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_json_lines_are_read_through_every_compression(tmp_path: Path, suffix: str):
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(COMPRESSIONS[suffix](LINES))
    assert bodies(read_json_lines(SourceFile(file, None))) == ROWS


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESSIONS if suffix])
def test_a_truncated_compressed_file_is_named_with_the_offset(tmp_path: Path, suffix: str):
    file = tmp_path / f"a.jsonl{suffix}"
    whole = COMPRESSIONS[suffix](LINES)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"a\.jsonl{suffix} is damaged or cut short near byte \d+ of \d+"):
        list(read_json_lines(SourceFile(file, None)))


def test_line_numbers_count_blank_lines(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a":1}\n\n{"a":2}\n')
    assert [row.line for row in read_json_lines(SourceFile(file, "val"))] == [1, 3]


def test_an_overlong_line_is_passed_over_and_the_next_one_read(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"text": "')
        for _ in range(50):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}\n{"text": "after"}\n')
    first, second = read_json_lines(SourceFile(file, None))
    assert isinstance(first.body, UnreadableRowError)
    assert str(first.body) == "line longer than 16 MiB"
    assert (second.line, json.loads(second.body)) == (2, {"text": "after"})


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_json_arrays_are_decoded_an_element_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(files, "_CHUNK_CHARACTERS", chunk)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(ROWS[:100], ensure_ascii=False, indent=1), encoding="utf-8")
    rows: list[RawRow] = list(read_json(SourceFile(file, None)))
    assert bodies(rows) == ROWS[:100]
    assert [row.line for row in rows[:3]] == [2, 6, 10]


def test_a_json_file_of_lines_is_read_as_lines(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_bytes(LINES)
    assert bodies(read_json(SourceFile(file, None))) == ROWS


def test_a_broken_json_array_is_named_with_the_line(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_text('[\n{"a": 1},\n{"a": \n')
    with pytest.raises(DataError, match=r"a\.json is broken JSON in the element at line 3"):
        list(read_json(SourceFile(file, None)))


def test_parquet_rows_and_a_truncated_parquet_file(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    assert bodies(read_parquet(SourceFile(file, None))) == ROWS
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=rf"a.parquet is damaged after row 0 of its {len(data) // 2} bytes"):
        list(read_parquet(SourceFile(file, None)))
    file.write_bytes(data[:200] + b"\xff" * 400 + data[600:])
    with pytest.raises(DataError, match=r"a.parquet is damaged after row \d+"):
        list(read_parquet(SourceFile(file, None)))


@pytest.mark.parametrize("chunk", [5, 1 << 20])
def test_plain_text_is_one_document_a_file_or_by_separator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(files, "_CHUNK_CHARACTERS", chunk)
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n---\nthree\n---\n四", encoding="utf-8")
    whole = list(read_text(SourceFile(file, None), ""))
    assert [row.body["text"] for row in whole] == ["one\ntwo\n---\nthree\n---\n四"]
    parts = list(read_text(SourceFile(file, None), "\n---\n"))
    assert [(row.line, row.body["text"]) for row in parts] == [(1, "one\ntwo"), (4, "three"), (6, "四")]


def test_every_array_of_a_file_is_read(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_text('[{"a": 1},\n{"a": 2}]\n\n[{"a": 3}]\n', encoding="utf-8")
    rows = list(read_json(SourceFile(file, None)))
    assert [(row.line, row.body) for row in rows] == [(1, {"a": 1}), (2, {"a": 2}), (4, {"a": 3})]
    file.write_text('[{"a": 1}]\n{"a": 2}\n', encoding="utf-8")
    with pytest.raises(
        DataError, match=r"a\.json is broken JSON in the element at line 2 \(something that is no array"
    ):
        list(read_json(SourceFile(file, None)))


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("before", ["\ufeff", " " * 5000, "\ufeff" + "\n" * 5000])
@pytest.mark.parametrize("form", ["[{}]", "{}"])
def test_marks_and_blanks_before_rows_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, before: str, form: str
):
    monkeypatch.setattr(files, "_CHUNK_CHARACTERS", chunk)
    file = tmp_path / "a.json"
    file.write_text(before + form.replace("{}", '{"a": "长江"}'), encoding="utf-8")
    rows = list(read_json(SourceFile(file, None)))
    assert bodies(rows) == [{"a": "长江"}]
    assert [row.line for row in rows] == [1 + before.count("\n")]


def test_a_json_file_of_lists_by_line_is_read_as_lines(tmp_path: Path):
    lists = [[{"role": "user", "text": str(n)}] for n in range(3)]
    lines, array = tmp_path / "a.json", tmp_path / "b.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in lists))
    array.write_text(json.dumps(lists))
    for file in (lines, array):
        assert bodies(read_json(SourceFile(file, None), rows_are_lists=True)) == lists


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_an_element_too_much_for_python_is_one_row_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
):
    monkeypatch.setattr(files, "_CHUNK_CHARACTERS", chunk)
    file = tmp_path / "a.json"
    deep = "[" * 2000 + '"]\\"["' + "]" * 2000
    file.write_text(f'[{{"a": 1}},\n{{"a": {"9" * 5000}, "b": "}}"}},\n{deep},\n{"7" * 5000},\n{{"a": 2}}]')
    rows = list(read_json(SourceFile(file, None)))
    assert [(row.line, str(row.body)) for row in rows] == [
        (1, "{'a': 1}"),
        (2, "number of thousands of digits"),
        (3, "nested too deeply"),
        (4, "number of thousands of digits"),
        (5, "{'a': 2}"),
    ]


def test_a_separator_may_be_written_as_a_command_line_hands_it_on(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("one\n===\ntwo\n===\n\n===\nthree", encoding="utf-8")
    for separator in (r"\n===\n", "\n===\n"):
        parts = list(read_text(SourceFile(file, None), separator))
        assert [(row.line, row.body["text"]) for row in parts] == [(1, "one"), (3, "two"), (7, "three")]
    file.write_text(r"a\nb", encoding="utf-8")
    assert [row.body["text"] for row in read_text(SourceFile(file, None), r"\\n")] == ["a", "b"]


def test_parquet_rows_that_python_cannot_hold_are_rejected_alone(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = pa.array([b"a", b"\xff\xfe", b"c", b"d"]).view(pa.string())
    times = pa.array([0, 0, 1 << 62, 0], pa.int64()).view(pa.timestamp("us"))
    pq.write_table(pa.table({"text": texts, "time": times}), tmp_path / "a.parquet")
    rows = list(read_parquet(SourceFile(tmp_path / "a.parquet", None)))
    assert [row.line for row in rows] == [1, 2, 3, 4]
    assert [isinstance(row.body, UnreadableRowError) for row in rows] == [False, True, True, False]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_table_gives_back_what_pythons_own_writer_wrote(tmp_path: Path, suffix: str, delimiter: str):
    rows = [{"instruction": f'第 {n} 问,\t"引"\n第二行', "output": f"答 {n}"} for n in range(500)]
    plain = tmp_path / "plain"
    with plain.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, ("instruction", "output"), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    file = tmp_path / f"a.csv{suffix}"
    file.write_bytes(COMPRESSIONS[suffix](plain.read_bytes()))
    read = list(read_table(SourceFile(file, "val"), delimiter))
    assert [row.body for row in read] == rows
    assert [(row.line, row.split) for row in read[:2]] == [(2, "val"), (4, "val")]


def test_a_row_of_a_table_with_other_cells_than_the_first_is_rejected_alone(tmp_path: Path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n\n3\n4,5,6\n7,8\n")
    found = [row.body for row in read_table(SourceFile(tmp_path / "a.csv", None), ",")]
    assert [str(body) for body in found] == [
        "{'a': '1', 'b': '2'}",
        "1 cells where the first row has 2",
        "3 cells where the first row has 2",
        "{'a': '7', 'b': '8'}",
    ]


@pytest.mark.parametrize("text", ["a,a\n1,2\n", "a,\n1,2\n"])
def test_a_table_that_does_not_name_its_columns_is_refused(tmp_path: Path, text: str):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match="does not name every column once"):
        list(read_table(SourceFile(tmp_path / "a.csv", None), ","))


@pytest.mark.parametrize("text", ['a,b\n1,"2\n3,4\n', 'a,b\n"你"好,2\n', 'a,b\n1,"2\n3,4\n5,"6\n'])
def test_a_quote_that_would_swallow_rows_or_vanish_is_refused(tmp_path: Path, text: str):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=r"no table from line \d+ on .*mend its quotes"):
        list(read_table(SourceFile(tmp_path / "a.csv", None), ","))


def test_an_empty_cell_is_no_field(tmp_path: Path):
    (tmp_path / "a.csv").write_text("instruction,history,text\nq,,\n,,t\n")
    assert [row.body for row in read_table(SourceFile(tmp_path / "a.csv", None), ",")] == [
        {"instruction": "q"},
        {"text": "t"},
    ]


@pytest.fixture
def cell_limit_put_back():
    """The limit on a cell is the process's own, and other tests read tables too."""
    limit = csv.field_size_limit()
    yield
    csv.field_size_limit(limit)


@pytest.mark.usefixtures("cell_limit_put_back")
@pytest.mark.parametrize(
    "cell", ["x" * 200, f'"{"x" * 200}"', '"' + "line, with ""quotes"" of more\n" * 10 + '"', '"' + "ab\n" * 99 + '"'],
    ids=["plain", "quoted", "of several lines", "of many lines"],
)  # fmt: skip
def test_a_cell_that_is_too_long_is_rejected_with_its_row_alone(cell: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 100)
    lines = cell.count("\n")
    (tmp_path / "a.csv").write_text(f'a,b\n1,2\n3,{cell}\n"5\n",6\n{cell},8\n9,10\n')
    rows = list(read_table(SourceFile(tmp_path / "a.csv", None), ","))
    assert [row.line for row in rows] == [2, 3, 4 + lines, 6 + lines, 7 + 2 * lines]
    assert [row.body if isinstance(row.body, dict) else str(row.body) for row in rows] == [
        {"a": "1", "b": "2"}, "cell longer than 0 MiB", {"a": "5\n", "b": "6"}, "cell longer than 0 MiB",
        {"a": "9", "b": "10"},
    ]  # fmt: skip


@pytest.mark.usefixtures("cell_limit_put_back")
def test_a_quote_that_another_one_far_below_seems_to_close_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 100)
    (tmp_path / "a.csv").write_text('a,b\n1,"2\n' + "3,4\n" * 100 + '5,"six"\n')
    with pytest.raises(DataError, match=r"no table from line 103 on \('s' behind a quote\); mend its quotes"):
        list(read_table(SourceFile(tmp_path / "a.csv", None), ","))


@pytest.mark.parametrize("delimiter", [";", "\t", ","])
def test_another_delimiter_than_the_suffix_promises_is_seen_in_the_first_row(tmp_path: Path, delimiter: str):
    (tmp_path / "a.csv").write_text(f"instruction{delimiter}output\nq, or; both{delimiter}a\n".replace(
        f"q, or; both{delimiter}", f'"q, or; both"{delimiter}'))  # fmt: skip
    (row,) = read_table(SourceFile(tmp_path / "a.csv", None), ",")
    assert row.body == {"instruction": "q, or; both", "output": "a"}


def test_messages_in_a_cell_are_messages_where_they_are_json_and_rejected_in_pythons_notation(tmp_path: Path):
    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerows([
            ("prompt", "chosen"),
            ("q", json.dumps(messages, ensure_ascii=False)),
            ("q", str(messages)),
            ('{"value": 1}', "[{'from': 'Bonn'}]"),
        ])  # fmt: skip
    bodies = [row.body for row in read_table(SourceFile(tmp_path / "a.csv", None), ",")]
    assert bodies[0] == {"prompt": "q", "chosen": messages}
    assert str(bodies[1]) == "cell of messages in Python's notation, not JSON"
    assert bodies[2] == {"prompt": '{"value": 1}', "chosen": "[{'from': 'Bonn'}]"}


@pytest.mark.usefixtures("cell_limit_put_back")
def test_a_quote_that_never_ends_is_named_and_swallows_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 100)
    (tmp_path / "a.csv").write_text('a,b\n1,"2\n' + "3,4\n" * 100)
    with pytest.raises(DataError, match=r"no table from line \d+ on .*mend its quotes"):
        list(read_table(SourceFile(tmp_path / "a.csv", None), ","))
