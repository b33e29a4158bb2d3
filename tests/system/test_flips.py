"""One flipped bit anywhere in a run, its token cache, its base or its adapter: refused in a sentence, or no matter.

`CQLORA_FLIPS` sets how many bits are flipped, each alone (4); what became of them is counted and printed.
"""

import functools
import hashlib
import json
import logging
import os
import random
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cqlora.base import README
from cqlora.system.metrics import read_metrics
from tests.cards import drop_card
from tests.commands import forked
from tests.runs import build_base, typed_run

FLIPS = int(os.environ.get("CQLORA_FLIPS", "4"))
RUN = (
    "stage=pretrain", "stage.max_steps=4", "stage.checkpoint_every_steps=1", "stage.keep_last=3", "data.workers=1",
    "stage.eval_tokens=100", "stage.sequence_length=64", "stage.eval_every_steps=4",
)  # fmt: skip
CLOCKS = ("seconds", "tokens_per_second", "peak_memory_gib", "matmul_share")
REFUSED, SAME = "refused", "identical"
LONGEST_SENTENCE = 700


def compose(case: Path) -> Any:
    return typed_run(case, *RUN, f"model.path={case}/base")


def hash_files(folder: Path) -> dict[str, str]:
    """Of all but the page for people, who are to write in it (its licence, say): it is sealed nowhere."""
    files = [file for file in sorted(folder.iterdir()) if file.name != README]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def resume(case: Path) -> Any:
    """Train to the end; the record without its clocks, and the adapter."""
    from cqlora.train.run import train

    train(compose(case), case / "run")
    rows = [{key: value for key, value in row.items() if key not in CLOCKS} for row in read_metrics(case / "run")]
    events = [row for row in rows if row["kind"] == "event"]
    return {"adapter": hash_files(case / "run" / "adapter"), "numbers": [r for r in rows if r not in events],
            "events": events}  # fmt: skip


def merge(case: Path) -> Any:
    """Put the adapter into the base; the files."""
    from cqlora.merge import MergeConfig
    from cqlora.merge import merge as merge_as

    merge_as(MergeConfig(base=f"{case}/base", adapter=[f"{case}/adapter"], output_dir=f"{case}/merged"))
    return hash_files(case / "merged")


def chat(case: Path) -> Any:
    """Two replies."""
    from cqlora.engine import LlamaEngine
    from cqlora.engine_config import EngineConfig

    EngineConfig(base=f"{case}/base", adapter=f"{case}/adapter").check_folders()
    engine = LlamaEngine(case / "adapter", case / "base", dtype="float32")
    asked = ("长江在哪里？", "hello <|im_end|>")
    return [engine.generate([{"role": "user", "text": text}], max_new_tokens=24, temperature=0) for text in asked]


READERS: dict[str, Callable[[Path], Any]] = {"resume": resume, "merge": merge, "chat": chat}
READERS_OF = {"run": ["resume"], "cache": ["resume"], "adapter": ["merge", "chat"], "base": list(READERS)}


def build(case: Path, has_card: bool) -> None:
    """A base and an adapter, and the folder of a run that was killed in its last step."""
    base = build_base(case.parent, case / "base", tied=False)
    if not has_card:
        drop_card(base)
    resume(case)
    (case / "run" / "adapter").rename(case / "adapter")
    shutil.rmtree(case / "run" / "checkpoints" / "step-00000004")
    record = case / "run" / "metrics.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    (end,) = [number for number, line in enumerate(lines, 1) if '"step": 3, "event": "checkpoint"' in line]
    record.write_text("".join(lines[:end]))


def answer(function: Callable[[Path], Any], case: Path, file: Path, log: Path) -> None:
    """Write what a function of a case returned, or how it ended."""
    from cqlora.errors import CqloraError

    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
    os.dup2(1, 2)
    logging.basicConfig(stream=sys.stderr)
    os.environ["XDG_CACHE_HOME"] = str(case / "home")
    try:
        found = (SAME, function(case))
    except CqloraError as error:
        found = (REFUSED, str(error))
    except Exception:  # noqa: BLE001
        found = ("traceback", traceback.format_exc())
    file.write_text(json.dumps(found))


class World:
    """The folders that bits are flipped in, and what each reader makes of them as they are."""

    def __init__(self, folder: Path, has_card: bool) -> None:
        self.folder, self.case = folder, folder / "case"
        self.case.mkdir(parents=True)
        kind, detail, log = self.ask(functools.partial(build, has_card=has_card))
        assert kind == SAME, (detail, log)
        self.whole = self.case.rename(folder / "whole")
        files = (file for file in self.whole.rglob("*") if file.is_file() and file.stat().st_size)
        self.files = sorted(file.relative_to(self.whole) for file in files if file.suffix != ".lock")
        self.events = [row for row in read_metrics(self.whole / "run") if row["kind"] == "event"]
        self.known: dict[str, Any] = {}

    def ask(self, function: Callable[[Path], Any]) -> tuple[str, Any, str]:
        """What a function made of the case, in a process of its own; its log."""
        file, log = self.folder / "answer.json", self.folder / "log.txt"
        file.unlink(missing_ok=True)
        child = forked.Process(target=answer, args=(function, self.case, file, log))
        child.start()
        child.join()
        kind, detail = json.loads(file.read_text()) if file.is_file() else (f"exit {child.exitcode}", None)
        return kind, detail, log.read_text()

    def expect(self, reader: str) -> Any:
        """What a reader makes of the folders as they are."""
        if reader not in self.known:
            self.copy()
            kind, self.known[reader], log = self.ask(READERS[reader])
            assert kind == SAME, (self.known[reader], log)
        return self.known[reader]

    def copy(self) -> None:
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.whole, self.case)

    def flip(self, file: Path, place: int, bit: int, reader: str) -> tuple[str, Any]:
        """How a reader takes one flipped bit, and what it made or said of it."""
        expected = self.expect(reader)
        self.copy()
        content = bytearray((self.case / file).read_bytes())
        content[place] ^= 1 << bit
        (self.case / file).write_bytes(content)
        kind, found, log = self.ask(READERS[reader])
        if kind == REFUSED and ("\n" in found or len(found) > LONGEST_SENTENCE):
            return "no sentence", found
        if kind == SAME and not self.is_same(found, expected, log):
            return "different", (found, expected, log)
        return kind, found

    def is_same(self, found: Any, expected: Any, log: str) -> bool:
        """Whether a reader made what it should, and no event of the record is lost or changed without a word."""
        if "events" not in found:
            return bool(found == expected)
        lost = [event for event in self.events if event not in found["events"]]
        told = not lost or "is damaged and left out" in log
        return told and {**found, "events": None} == {**expected, "events": None}


def choose_flips(world: World, generator: random.Random) -> Iterator[tuple[Path, int, int, str]]:
    """Every file in its turn, in one shuffled round after another: which byte, which bit, who reads it."""
    while True:
        for file in generator.sample(world.files, len(world.files)):
            place = generator.randrange((world.whole / file).stat().st_size)
            yield file, place, generator.randrange(8), generator.choice(READERS_OF[file.parts[0]])


@pytest.mark.parametrize("has_card", [True, False] if FLIPS > 4 else [True], ids=lambda has: "card" if has else "none")
def test_a_flipped_bit_is_refused_in_a_sentence_or_changes_nothing(has_card, tmp_path, capsys):
    world = World(tmp_path / "world", has_card)
    flips = choose_flips(world, random.Random(int(has_card)))
    outcomes, wrong = Counter[str](), []
    for _ in range(FLIPS // 2 if FLIPS > 4 else FLIPS):
        flip = next(flips)
        kind, detail = world.flip(*flip)
        outcomes[kind] += 1
        if kind not in (REFUSED, SAME):
            wrong.append((*flip, kind, detail))
    with capsys.disabled():
        print(f"\nof {outcomes.total()} flipped bits: {dict(outcomes)}")
    assert not wrong, wrong
