"""A corpus's rows: what cannot be read is told, a few are passed over, many end the command."""

import json
import logging
from pathlib import Path

import pytest

from cqlora.errors import DataError
from cqlora.vocab.corpus import open_corpus

GOOD = [json.dumps({"text": f"长江的第{n}条支流"}, ensure_ascii=False).encode() for n in range(40)]


@pytest.mark.parametrize(
    "bad, reason",
    [
        (b'{"text": ', "broken JSON: 1"),
        ('{"text": "长江发源于青藏高原"}'.encode("gbk"), "GB18030 and not UTF-8, .*: 1"),
        (b"[" * 100_000, "nested too deeply: 1"),
    ],
)
def test_a_row_that_cannot_be_read_is_passed_over_and_told_once_and_many_are_refused(
    bad, reason, tmp_path: Path, caplog
):
    file = tmp_path / "corpus.jsonl"
    file.write_bytes(b"\n".join([*GOOD[:20], bad, *GOOD[20:]]))
    corpus = open_corpus([str(file)], 0.0)
    with caplog.at_level(logging.WARNING):
        assert list(corpus.documents()) == list(corpus.documents()) == [json.loads(row)["text"] for row in GOOD]
    (told,) = caplog.messages
    assert "1 of 41 rows cannot be read" in told and told.endswith("passed over")
    file.write_bytes(b"\n".join([*GOOD[:3], bad]))
    with pytest.raises(DataError, match=rf"corpus.jsonl: 1 of 4 rows cannot be read \({reason}\); mend them"):
        list(corpus.documents())


def test_a_novel_in_another_encoding_is_told_with_the_command_that_converts_it(tmp_path: Path):
    (tmp_path / "novel.txt").write_bytes("第一回\n甄士隐梦幻识通灵\n".encode("gb18030"))
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be read \(GB18030 and not UTF-8, to which `iconv"):
        list(open_corpus([str(tmp_path)], 0.0).documents())
