"""What the operating system refuses is one sentence with the path, the reason and what to do."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from cqlora.cli import run_program
from cqlora.errors import CqloraError, DiskError
from cqlora.system.refusals import NoRoom, described_as_sentence, explain_os_error, find_os_error, require_space


@pytest.mark.parametrize("code", sorted(errno.errorcode))
def test_every_number_of_the_system_is_one_sentence_with_the_path(code):
    message = str(explain_os_error(OSError(code, os.strerror(code), "/some/place")))
    assert message.startswith("/some/place could not be ") and message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(
    "code, words",
    [
        (errno.ENOSPC, "No space left on device"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only file system"),
        (errno.EACCES, "no right"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.ENOTDIR, "a file and not a folder"),
        (errno.EIO, "the disk failed"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_what_a_user_meets_is_reported_with_what_to_do(code, words):
    assert words in str(explain_os_error(OSError(code, ""), Path("/some/place")))


def test_a_full_disk_is_reported_with_the_bytes_that_are_free_and_needed(tmp_path):
    with pytest.raises(NoRoom) as caught:
        require_space(tmp_path, 10**18)
    assert "1,000,000,000,000,000,000 bytes are needed" in str(explain_os_error(caught.value, tmp_path / "file"))
    require_space(tmp_path / "not" / "there", 1)


def test_a_path_of_any_length_leaves_a_sentence_that_can_be_read(tmp_path):
    with pytest.raises(DiskError) as caught, described_as_sentence():
        (tmp_path / ("x" * 300)).write_text("")
    assert "the name is too long" in str(caught.value) and len(str(caught.value)) < 300


def test_errors_of_rust_and_numpy_are_known_for_what_they_are_and_others_are_left_alone():
    assert find_os_error(SafetensorError("I/O error: No space left on device (os error 28)")).errno == errno.ENOSPC
    assert find_os_error(OSError("8192 requested and 5904 written")).errno == errno.ENOSPC
    for error in (ValueError("x"), CqloraError("it (os error 2)"), OSError("no number"), KeyError("a")):
        assert find_os_error(error) is None
    with pytest.raises(ZeroDivisionError), described_as_sentence(Path("file")):
        raise ZeroDivisionError


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_disk_that_takes_nothing_is_known_whoever_writes():
    with pytest.raises(DiskError, match="No space left"), described_as_sentence(Path("file")):
        Path("/dev/full").write_bytes(b"x")
    with pytest.raises(DiskError, match="No space left"), described_as_sentence(Path("file")):
        np.zeros(1 << 16).tofile("/dev/full")


def test_what_lies_in_the_staging_folder_is_reported_under_the_name_that_it_was_to_have(tmp_path):
    with pytest.raises(DiskError) as caught, described_as_sentence(tmp_path / "out", tmp_path / ".out.partial"):
        (tmp_path / ".out.partial" / "file").write_text("")
    assert str(caught.value).startswith(f"{tmp_path}/out could not be written")
    with pytest.raises(DiskError) as caught, described_as_sentence(tmp_path / "out", tmp_path / ".out.partial"):
        (tmp_path / "source").read_text()
    assert str(caught.value).startswith(f"{tmp_path}/source ")


def test_a_program_ends_with_the_sentence_and_no_traceback(monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/some/place")

    monkeypatch.setattr("cqlora.cli._compose_and_call", refuse)
    monkeypatch.setattr("sys.argv", ["cqlora run"])
    with pytest.raises(SystemExit) as ended:
        run_program("config", dict, refuse)
    message = capsys.readouterr().err
    assert ended.value.code == 1
    assert message.startswith("error: /some/place ") and message.count("\n") == 1


def test_a_copy_that_finds_no_room_names_where_it_goes_and_the_room_there(tmp_path):
    copied = OSError(errno.ENOSPC, "No space left on device", "/base/a.json", None, "/full/a.json")
    with pytest.raises(DiskError) as told, described_as_sentence():
        raise copied
    assert str(told.value).startswith("/full/a.json could not be")
    with pytest.raises(DiskError) as told, described_as_sentence(tmp_path / "out", Path("/full")):
        raise copied
    assert str(told.value).startswith(f"{tmp_path}/out could not be written")
