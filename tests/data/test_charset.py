"""Files in other encodings are told with the command that converts them."""

import subprocess
from pathlib import Path

import pytest

from cqlora.data.charset import describe_undecodable
from cqlora.data.clean import mend_surrogates
from cqlora.data.records import RowError

TEXT = "长江发源于青藏高原，流经十一个省市。GDP 约占全国的 45%。\n" * 3


@pytest.mark.parametrize("encoding, named", [("gbk", "GB18030"), ("gb18030", "GB18030"), ("utf-16", "UTF-16")])
def test_the_command_that_is_told_gives_the_text_back(encoding, named, tmp_path: Path):
    file = tmp_path / "novel.txt"
    file.write_bytes(TEXT.encode(encoding))
    told = describe_undecodable(file.read_bytes())
    assert told.startswith(f"{named} and not UTF-8")
    command = told.partition("`")[2].partition("`")[0].replace("FILE", str(file))
    converted = subprocess.run(command.split(), capture_output=True, check=True).stdout
    assert converted.decode("utf-8-sig") == TEXT


@pytest.mark.parametrize(
    "raw", ["café olé".encode("latin-1"), bytes(range(256)) * 9, b"\xff", "Größe".encode("cp1252")]
)
def test_bytes_of_no_such_encoding_are_only_no_utf_8(raw):
    assert describe_undecodable(raw) == "not UTF-8"


def test_a_text_that_was_read_with_its_bytes_kept_is_told_as_the_bytes_are():
    read = TEXT.encode("gbk").decode(errors="surrogateescape")
    for text in (read, "\ud800" + read, TEXT.encode("gbk")[:-3].decode(errors="surrogateescape")):
        with pytest.raises(RowError, match=r"^GB18030 and not UTF-8"):
            mend_surrogates(text)
