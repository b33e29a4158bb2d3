"""Files and folders that are whole under their names at every moment, whoever is killed and whoever else writes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cqlora.errors import DiskError, ModelError
from cqlora.system import durable
from cqlora.system.durable import hold, recover_folders, replace_file, staged_file, staged_folder

CALLS = ("open", "close", "fsync", "mkdir", "rename", "replace", "rmdir", "unlink", "stat", "scandir", "listdir")
"""Functions of `os` by which the module reaches the system; pathlib and shutil call them too."""


def write_new(target: Path) -> None:
    with staged_folder(target, replace=True) as staging:
        (staging / "one").write_text("new")
        (staging / "part").mkdir()
        (staging / "part" / "two").write_text("new")


def read_folder(target: Path) -> dict[str, str]:
    return {file.relative_to(target).as_posix(): file.read_text() for file in target.rglob("*") if file.is_file()}


def die_at(number: int, action: Callable[[], None]) -> bool:
    """Run `action` in a child that kill -9 ends before its call `number` of the system; whether it came to that."""
    child = os.fork()
    if child == 0:
        left = [number]

        def trap(function: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        for name in CALLS:
            setattr(os, name, trap(getattr(os, name)))
        durable.fcntl.flock = trap(durable.fcntl.flock)  # type: ignore[assignment]
        durable.exchange = trap(durable.exchange)  # type: ignore[assignment]
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("swaps", ["at one instant", "by two renames"])
@pytest.mark.parametrize("before", ["a folder", "nothing"])
def test_kill_9_at_every_call_leaves_the_old_or_the_new_folder_whole(before, swaps, tmp_path, monkeypatch):
    if swaps == "by two renames":
        monkeypatch.setattr(durable, "exchange", lambda one, other: False)
    elif not durable.exchange(*make_pair(tmp_path / "pair")):
        pytest.skip("this file system cannot exchange two names")
    old, new = {"one": "old", "gone": "old"}, {"one": "new", "part/two": "new"}
    seen = []
    for number in range(1000):
        parent = tmp_path / str(number)
        target = parent / "target"
        if before == "a folder":
            target.mkdir(parents=True)
            for name, text in old.items():
                (target / name).write_text(text)
        died = die_at(number, lambda target=target: write_new(target))
        recover_folders(parent)
        found = read_folder(target) if target.exists() else None
        assert found == new or found == (old if before == "a folder" else None), number
        seen.append(found == new)
        write_new(target)
        assert read_folder(target) == new
        assert [path.name for path in parent.iterdir()] == ["target"], "the next writer removes what is left"
        if not died:
            break
    assert len(seen) > 20
    assert seen == sorted(seen), "once new, never old again"
    assert not seen[0] and seen[-1]


def make_pair(folder: Path) -> tuple[Path, Path]:
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    return folder / "a", folder / "b"


def test_kill_9_at_every_call_leaves_the_old_or_the_new_file_whole(tmp_path):
    file, seen = tmp_path / "file", []
    for number in range(1000):
        file.write_text("old")
        died = die_at(number, lambda: replace_file(file, b"new"))
        seen.append(file.read_text())
        replace_file(file, b"third")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        if not died:
            break
    assert len(seen) > 8
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


def test_the_disk_has_every_file_before_the_rename_and_the_parent_after_it(tmp_path, monkeypatch):
    done = []
    fsync, swap, rename = os.fsync, durable.exchange, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(durable, "exchange", lambda one, other: (done.append("renamed"), swap(one, other))[1])
    monkeypatch.setattr(Path, "rename", lambda self, other: (done.append("renamed"), rename(self, other))[1])
    for _ in range(2):
        done.clear()
        write_new(tmp_path / "target")
        moment = done.index("renamed")
        names = {Path(path).name for path in done[:moment]}
        assert {"one", "two", "part"} <= names and any(name.endswith(".partial") for name in names)
        assert str(tmp_path) in done[moment:]
    done.clear()
    replace_file(tmp_path / "file", b"content")
    assert done[0].endswith(".partial") and done[1:] == ["renamed", str(tmp_path)]


def test_a_second_writer_is_refused_in_one_sentence_and_writes_nothing(tmp_path):
    with staged_folder(tmp_path / "target") as staging:
        (staging / "one").write_text("first")
        with (
            pytest.raises(DiskError, match=r"^another process is writing to .*target; [^.]*\.$"),
            staged_folder(tmp_path / "target"),
        ):
            raise AssertionError("never entered")
    assert read_folder(tmp_path / "target") == {"one": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_two_names_of_one_folder_are_one_lock_and_a_dangling_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with hold(tmp_path / "real"), pytest.raises(DiskError, match="another process"), staged_folder(tmp_path / "link"):
        raise AssertionError("never entered")
    write_new(tmp_path / "link")
    assert read_folder(tmp_path / "real") == {"one": "new", "part/two": "new"}


def test_the_neighbour_whose_name_begins_alike_keeps_its_staging_folder(tmp_path):
    with staged_folder(tmp_path / "a.b") as staging:
        (staging / "one").write_text("b")
        write_new(tmp_path / "a")
    assert read_folder(tmp_path / "a.b") == {"one": "b"}


def test_a_writer_that_waits_gets_its_turn_when_the_holder_is_killed(tmp_path):
    command = f"""
import os, signal, sys
from pathlib import Path
from cqlora.system.durable import hold
with hold(Path({str(tmp_path / "target")!r})):
    print("held", flush=True)
    signal.pause()
"""
    holder = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(DiskError, match="another process"), hold(tmp_path / "target"):
        raise AssertionError("never entered")
    holder.kill()
    with hold(tmp_path / "target", wait=True):
        pass
    holder.wait()
    assert not list(tmp_path.iterdir())


def test_many_writers_of_one_target_take_turns_and_none_sees_another(tmp_path):
    children = []
    for number in range(6):
        child = os.fork()
        if child == 0:
            for _ in range(15):
                with hold(tmp_path / "target", wait=True):
                    (tmp_path / "inside").mkdir()
                    time.sleep(0)
                    (tmp_path / "inside").rmdir()
            os._exit(0)
        children.append((number, child))
    assert all(os.waitpid(child, 0)[1] == 0 for _, child in children), "two were inside at once"


def test_what_is_there_is_not_overwritten_unless_asked_and_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("kept", "file"):
        with pytest.raises(ModelError, match="already there"), staged_folder(tmp_path / name):
            raise AssertionError("never entered")
    (tmp_path / "empty").mkdir()
    with staged_folder(tmp_path / "empty") as staging:
        (staging / "one").write_text("new")
    assert read_folder(tmp_path / "empty") == {"one": "new"}
    with pytest.raises(DiskError, match="could not be"), staged_folder(tmp_path / "file", replace=True):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("write", [staged_folder, staged_file])
def test_an_interrupted_writer_leaves_nothing(write, tmp_path):
    with pytest.raises(KeyboardInterrupt), write(tmp_path / "target"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
