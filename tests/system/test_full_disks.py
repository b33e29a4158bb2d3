"""Full disks and read-only folders: one sentence, nothing half-written, and the same result once there is room.

`CQLORA_DISK_CASES` sets how many sizes of a disk each verb is tried on (1).
"""

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands import forked
from tests.runs import SMALL
from tests.weights.adapters import write_adapter, write_tiny_base
from tests.weights.test_convert import write_model

SIZES = int(os.environ.get("CQLORA_DISK_CASES", "1"))
ROOM = 256 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a verb's files go."""

    disk: Path
    """On the disk that fills."""
    roomy: Path
    """On one that does not."""
    given: Path
    """Bases and adapters."""


def train(place: Place, run: Path, cache: Path) -> list[str]:
    return [
        "run", "stage=pretrain", *SMALL, "stage.max_steps=2", "stage.checkpoint_every_steps=1", "stage.keep_last=9",
        f"hydra.run.dir={run}", f"data.cache_dir={cache}", "stage.sequence_length=256",
    ]  # fmt: skip


def weights(verb: str, *overrides: str) -> Callable[[Place], list[str]]:
    return lambda place: [verb, *(text.format(given=place.given) for text in overrides), f"output_dir={place.disk}/out"]


CASES: dict[str, Callable[[Place], list[str]]] = {
    "run, its folder": lambda place: train(place, place.disk / "run", place.roomy / "cache"),
    "run, its cache": lambda place: train(place, place.roomy / "run", place.disk / "cache"),
    "run, its model": lambda place: train(place, place.roomy / "run", place.roomy / "cache"),
    "prepare": lambda place: [
        "prepare", "stage=sft", "model=tiny", "data=sample", f"data.cache_dir={place.disk}/cache", "data.workers=1",
    ],
    "merge": weights("merge", "base={given}/base", "adapter={given}/adapter", "max_shard_size=200KB"),
    "merge to GGUF": weights("merge", "base={given}/base", "adapter={given}/adapter", "format=gguf"),
    "extend": weights("extend", "base={given}/base", "vocab=cjk", "copy=true"),
    "convert": weights("convert", "input_dir={given}/raw", "vocab=none"),
}  # fmt: skip


def call(arguments: list[str], folder: Path, log: Path) -> None:
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.chdir(folder)
    import torch

    torch.set_num_threads(1)
    sys.argv = [f"cqlora {arguments[0]}", *arguments[1:]]
    importlib.import_module(f"cqlora.{arguments[0]}").main()


def run_verb(name: str, place: Place, log: Path) -> tuple[int, str]:
    """Exit code and what was printed."""
    folder = place.disk if name == "run, its model" else place.roomy
    child = forked.Process(target=call, args=(CASES[name](place), folder, log))
    child.start()
    child.join(300)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode, log.read_text()


def digest(place: Place) -> str:
    """Of all that a verb is to leave, but for times and paths."""
    digest = hashlib.sha256()
    for root in (place.disk, place.roomy):
        for file in sorted(file for file in root.rglob("*") if file.is_file()):
            kept = file.suffix in (".safetensors", ".bin", ".gguf") or file.name in ("tokenizer.json", "config.json")
            if kept and "checkpoints" not in file.parts and file.parent.name != "models":
                digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def unfinished(disk: Path) -> list[Path]:
    return [path for path in disk.rglob("*") if path.name.endswith((".partial", ".staging", ".lock", ".old"))]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    write_tiny_base(folder / "base")
    write_adapter(folder / "base", folder / "adapter")
    write_model(folder / "raw", "llama")
    return folder


@pytest.fixture(scope="module")
def expected(given, tmp_path_factory) -> Callable[[str], tuple[str, int]]:
    """What a verb leaves where there is room: its digest, and the bytes that it needs on the disk."""
    known: dict[str, tuple[str, int]] = {}

    def find(name: str) -> tuple[str, int]:
        if name not in known:
            place = make_place(tmp_path_factory.mktemp("whole"), given)
            code, message = run_verb(name, place, place.roomy.parent / "log.txt")
            assert code == 0, message
            pages = sum(-(-file.stat().st_size // 4096) * 4096 + 4096 for file in place.disk.rglob("*"))
            known[name] = digest(place), pages
        return known[name]

    return find


def make_place(folder: Path, given: Path) -> Place:
    place = Place(folder / "disk", folder / "roomy", given)
    place.disk.mkdir()
    place.roomy.mkdir()
    return place


@pytest.fixture
def mounted(tmp_path, given) -> Iterator[Callable[[int], Place]]:
    place = make_place(tmp_path, given)

    def mount(size: int) -> Place:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place.disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs more rights than this user has")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place.disk)], check=False, capture_output=True)


def remount(place: Place, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place.disk)], check=True)


def check_refusal(code: int, message: str, words: str) -> None:
    # 2 where the run's own folder cannot be: another value for it helps.
    assert code in (1, 2), message
    assert "Traceback" not in message, message
    errors = [line for line in message.splitlines() if "error: " in line]
    assert len(errors) == 1 and words in errors[0], message


@pytest.mark.parametrize("share", [(2 * n + 1) / (2 * SIZES + 0.6) for n in range(SIZES)])
@pytest.mark.parametrize("name", CASES)
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on_when_there_is_room(
    name, share, mounted, expected, tmp_path
):
    whole, needed = expected(name)
    place = mounted(max(4096, int(share * needed)))
    code, message = run_verb(name, place, tmp_path / "log.txt")
    if code:
        check_refusal(code, message, "No space left on device")
        assert f"{place.disk}" in message or "models/tiny" in message
        assert not unfinished(place.disk)
        assert not (place.disk / "out").exists()
        remount(place, f"size={ROOM}")
        code, message = run_verb(name, place, tmp_path / "log.txt")
        assert code == 0, message
    assert digest(place) == whole


@pytest.mark.parametrize("name", CASES if SIZES > 1 else ["run, its folder", "prepare", "merge"])
def test_a_read_only_folder_is_one_sentence_and_the_same_command_goes_on_when_it_can_be_written(
    name, mounted, expected, tmp_path
):
    whole, _ = expected(name)
    place = mounted(ROOM)
    remount(place, "ro")
    check_refusal(*run_verb(name, place, tmp_path / "log.txt"), "read-only file system")
    remount(place, "rw")
    code, message = run_verb(name, place, tmp_path / "log.txt")
    assert code == 0, message
    assert digest(place) == whole
