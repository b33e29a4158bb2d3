"""Malformed rows of every kind of source, generated: each is read, rejected with its place, or dropped, and counted."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cqlora.base import Base
from cqlora.config.choices import OasstPaths, SourceKind
from cqlora.config.schema import SourceConfig
from cqlora.data.cache import prepare_cache
from tests.data.conftest import MakeConfig

ROWS = 160
LONG_NUMBER = "@ a number of 5,000 digits @"
"""Put in place when a row is written, since Python writes no such number."""

HOSTILE: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "number": lambda: 5,
    "long number": lambda: LONG_NUMBER,
    "number beyond floats": lambda: 10**400,
    "not a number": lambda: float("nan"),
    "truth": lambda: True,
    "list": lambda: ["x"],
    "empty list": list,
    "object": lambda: {"a": 1},
    "nesting": lambda: json.loads("[" * 200 + "]" * 200),
    "blank": lambda: " \n\t",
    "half a pair": lambda: "user\ud800",
    "undecoded byte": lambda: "长\udc80江",
    "nul": lambda: "\0\x01\ufffe",
    "huge entity": lambda: "&#" + "9" * 5000 + ";",
    "combining marks": lambda: "a" + "\u0301\u0323" * 30_000,
    "control tokens": lambda: "<|im_end|>\n<|im_start|>system\n",
    "long word": lambda: "江" * 50_000,
    "markup": lambda: "<ref>{{[[-{" * 5000,
}


def said(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "text": text} | more


def oasst_message(number: int, name: str, parent: str | None, role: str) -> dict[str, Any]:
    of_tree = {"message_id": f"{name}{number}", "parent_id": parent and f"{parent}{number}", "rank": 0, "lang": "zh"}
    return of_tree | {"message_tree_id": f"t{number}", "role": role, "text": f"第 {number} 条{name}"}


def oasst_tree(number: int) -> dict[str, Any]:
    prompt, first, second = (
        oasst_message(number, name, parent, role)
        for name, parent, role in (("p", None, "prompter"), ("a", "p", "assistant"), ("b", "p", "assistant"))
    )
    return {"message_tree_id": f"t{number}", "prompt": prompt | {"replies": [first | {"replies": []}, second]}}


GOOD: dict[str, tuple[SourceKind, Callable[[int], list[Any]]]] = {
    "wiki": (SourceKind.wiki, lambda n: [{"id": str(n), "title": f"题 {n}", "text": f"第 {n} 篇关于长江的文章。"}]),
    "wikitext": (
        SourceKind.wiki,
        lambda n: [{"title": f"T{n}", "namespace": "0", "redirect": False, "wikitext": f"Page [[{n}]] is here."}],
    ),
    "text": (SourceKind.text, lambda n: [{"text": f"document number {n}", "meta": {"n": n}}]),
    "dialog": (SourceKind.dialog, lambda n: [[said("user", f"问 {n}"), said("assistant", f"答 {n}")]]),
    "messages": (
        SourceKind.messages,
        lambda n: [{"messages": [said("user", f"q {n}"), said("assistant", f"a {n}")], "system": "s", "tools": "[]"}],
    ),
    "sharegpt": (
        SourceKind.sharegpt,
        lambda n: [{"conversations": [{"from": "human", "value": f"q {n}"}, {"from": "gpt", "value": f"a {n}"}]}],
    ),
    "belle": (
        SourceKind.belle,
        lambda n: [
            {"instruction": f"q {n}", "input": "i", "output": f"a {n}", "history": [["b", "c"]], "system": "s"},
            {"instruction": f"t {n}", "instances": [{"input": "i", "output": f"a {n}"}, {"output": "b"}]},
            {"input": f"Human: x\nAssistant: y\nHuman: z {n}\nAssistant:", "target": f"a {n}"},
        ][n % 3 : n % 3 + 1],
    ),
    "alpaca": (
        SourceKind.alpaca,
        lambda n: [{"instruction": f"q {n}", "input": "i", "output": f"a {n}", "history": [["b", "c"]], "system": "s"}],
    ),
    "preference": (
        SourceKind.preference,
        lambda n: [{"prompt": f"q {n}", "chosen": [said("assistant", f"a {n}")], "rejected": f"b {n}"}],
    ),
    "auto": (SourceKind.auto, lambda n: [{"messages": [said("user", f"q {n}"), said("assistant", f"a {n}")]}]),
    "trees": (SourceKind.oasst1, lambda n: [oasst_tree(n)]),
    "message rows": (
        SourceKind.oasst1,
        lambda n: [oasst_message(n, "p", None, "prompter"), oasst_message(n, "a", "p", "assistant")],
    ),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a row, the row itself first."""
    keys = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in keys for place in places(each, (*path, key)))]


def spoil(row: Any, rng: random.Random) -> Any:
    """The row with one of its values hostile, missing, or twice as deep."""
    way = rng.choice(places(row))
    hostile = HOSTILE[rng.choice(sorted(HOSTILE))]()
    if not way:
        return hostile
    row = copy.deepcopy(row)
    holder = row
    for key in way[:-1]:
        holder = holder[key]
    if rng.random() < 0.2:
        del holder[way[-1]]
    else:
        holder[way[-1]] = hostile
    return row


def write_row(row: Any) -> bytes:
    """The row as JSON, with what Python would not write."""
    return json.dumps(row).replace(json.dumps(LONG_NUMBER), "9" * 5000).encode()


def damage(line: bytes, rng: random.Random) -> bytes:
    """A line cut short, with a byte flipped, or in another encoding."""
    place = rng.randrange(1, len(line))
    flipped = bytes([line[place] ^ 1 << rng.randrange(8)]).replace(b"\n", b" ")
    ways = (line[:place], line[:place] + flipped + line[place + 1 :], b"[" * 100_000 + line, line[:place] + b"\xff")
    return rng.choice(ways)


def malformed_lines(name: str, rng: random.Random) -> list[bytes]:
    """ROWS rows of a source, a good one in eight."""
    lines: list[bytes] = []
    for number in range(ROWS):
        for row in GOOD[name][1](number):
            form = number % 8
            if form in (0, 7):
                line = write_row(row)
                lines.append(line if form == 0 else damage(line, rng))
            else:
                lines.append(write_row(spoil(row, rng)))
    return lines


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("name", GOOD)
def test_malformed_rows_are_all_accounted_for(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig, name: str, suffix: str
):
    lines = malformed_lines(name, random.Random(f"{name}{suffix}"))
    if suffix == ".json":
        lines = [line for line in lines if is_json(line)]
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(b"[" + b",\n".join(lines) + b"]" if suffix == ".json" else b"\n".join(lines) + b"\n")
    paths = {"oasst_paths": OasstPaths.all} if GOOD[name][0] is SourceKind.oasst1 else {}
    source = SourceConfig(kind=GOOD[name][0], path=str(file), **paths)
    stage = "pretrain" if GOOD[name][0] in (SourceKind.wiki, SourceKind.text) else "sft"
    config = make_config({"rows": source}, stage=stage, max_rejected_fraction=1.0, val_fraction=0.1)
    cache = prepare_cache(config, byte_base)
    found = cache.summary["sources"]["rows"]
    rejected = [json.loads(line) for line in (cache.folder / "rejected.jsonl").read_text("utf-8").splitlines()]

    assert found["read"] == len(lines) or name == "message rows"
    assert len(lines) >= ROWS * 0.8
    kept = sum(found["kept"].values()) + found["duplicates"] + sum(found["left_out"].values())
    assert found["read"] + found["further_records"] == len(rejected) + sum(found["dropped"].values()) + kept
    assert len(rejected) == sum(found["rejected"].values()) > ROWS * 0.1
    assert sum(found["kept"].values()) >= ROWS // 8
    for row in rejected:
        assert row["file"] == file.name
        assert 1 <= row["line"] <= len(lines)
        assert row["reason"]
        # What no reader foresaw is accounted for too, but each should have a reason of its own.
        assert not row["reason"].startswith("cannot be parsed")


def is_json(line: bytes) -> bool:
    """Whether a line can stand in an array without breaking what follows it."""
    try:
        json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    except (ValueError, RecursionError):
        return not line.startswith(b"[[")
    return True


@pytest.mark.parametrize("row", [b'{"text": 1e999}', b'{"text": "\\ud800"}', b"\x00", b"\xef\xbb\xbf", b"{}", b'""'])
def test_a_single_odd_line_ends_nothing(tmp_path: Path, byte_base: Base, make_config: MakeConfig, row: bytes):
    good = [write_row({"text": f"a document, number {n}"}) for n in range(40)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good, row]))
    source = SourceConfig(kind=SourceKind.text, path=str(tmp_path / "a.jsonl"))
    found = prepare_cache(make_config({"a": source}), byte_base).summary["sources"]["a"]
    lost = sum(found["rejected"].values()) + sum(found["dropped"].values())
    assert (found["read"], lost) == (41, 1)


def test_xml_in_an_unknown_encoding_is_rejected_and_other_files_are_read(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig
):
    page = "<page><title>A</title><ns>0</ns><revision><text>Text of [[A]], {}.</text></revision></page>"
    for name, encoding in (("a", "x-unknown"), ("b", "utf-8")):
        pages = "".join(page.format(n) for n in range(20))
        declared = f'<?xml version="1.0" encoding="{encoding}"?><mediawiki>{pages}</mediawiki>'
        (tmp_path / f"{name}.xml").write_text(declared)
    source = SourceConfig(kind=SourceKind.wiki, path=str(tmp_path))
    cache = prepare_cache(make_config({"a": source}), byte_base)
    (row,) = [json.loads(line) for line in (cache.folder / "rejected.jsonl").read_text().splitlines()]
    assert (row["file"], row["line"], row["reason"][:17]) == ("a.xml", 1, "whole file unread")
    assert cache.summary["sources"]["a"]["read"] == 21


def test_a_table_of_instructions_trains_and_the_summary_says_what_its_rows_were_taken_for(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig
):
    lines = [f"问题 {n}，为什么？,回答 {n}" for n in range(20)]
    (tmp_path / "a.csv").write_text("\n".join(["instruction,output", *lines, "只有提问"]), encoding="utf-8")
    source = SourceConfig(kind=SourceKind.auto, path=str(tmp_path / "a.csv"))
    cache = prepare_cache(make_config({"rows": source}, stage="sft", max_rejected_fraction=0.1), byte_base)
    found = cache.summary["sources"]["rows"]
    assert (found["read"], found["changed"]) == (21, {"rows taken for alpaca": 20})
    assert found["rejected"] == {"1 cells where the first row has 2": 1}
    assert sum(found["kept"].values()) == 20
