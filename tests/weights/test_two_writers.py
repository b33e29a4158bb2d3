"""Two processes that write one output folder: it ends whole and of one of them, and the other is told.

`CQLORA_PAIRS` sets how many pairs of each verb are tried (3).
"""

import hashlib
import os
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from cqlora.config.choices import MergeOnto
from cqlora.errors import CqloraError
from cqlora.merge import MergeConfig
from cqlora.system import shards
from cqlora.vocab.config import VocabConfig, VocabKind
from cqlora.weights.convert import convert
from cqlora.weights.extend import extend
from cqlora.weights.merge import plan_merge, write_merge
from tests.commands import forked
from tests.weights.adapters import write_adapter, write_tiny_base
from tests.weights.test_convert import write_model

PAIRS = int(os.environ.get("CQLORA_PAIRS", "3"))


def merge_one(base: Path, given: Path, output: Path) -> None:
    config = MergeConfig(base=str(base), adapter=[str(given)], output_dir=str(output), max_shard_size="100KB")
    plan = plan_merge(base, [given], MergeOnto["16bit"], True, config.precision)
    write_merge(plan, output, config)


def extend_one(base: Path, given: Path, output: Path) -> None:
    corpus = str(given / "corpus.txt")
    extend(base, output, VocabConfig(kind=VocabKind.bpe, size=6, corpus=[corpus], min_frequency=1), 10**9, copy=True)


def convert_one(base: Path, given: Path, output: Path) -> None:
    convert(given / "raw", output, "", "auto", 100_000, VocabConfig())


VERBS = {"merge": merge_one, "extend": extend_one, "convert": convert_one}


def write(verb: str, base: Path, given: Path, output: Path, gate: Barrier, log: Path) -> None:
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    shards.READ_BYTES = 600
    gate.wait(60)
    try:
        VERBS[verb](base, given, output)
    except CqloraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> list[Path]:
    """Two of them, each with a text for `extend` to learn from and raw weights for `convert` beside it."""
    folder = tmp_path_factory.mktemp("given")
    made = [write_adapter(base, folder / str(seed), seed=seed) for seed in (1, 2)]
    for adapter, words in zip(made, ("山高水长", "风花雪月"), strict=True):
        (adapter / "corpus.txt").write_text("\n\n".join([words * 20] * 20))
    for adapter, family in zip(made, ("llama", "llama2, grouped queries, two ranks"), strict=True):
        write_model(adapter / "raw", family)
    return made


@pytest.mark.parametrize("verb", VERBS)
def test_the_folder_is_whole_and_of_one_of_two_writers_and_the_other_is_refused(
    verb, base, adapters, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "READ_BYTES", 600)
    alone = []
    for number, given in enumerate(adapters):
        # One name for all, since a folder may say what it is called.
        VERBS[verb](base, given, tmp_path / f"alone{number}" / "out")
        alone.append(digest(tmp_path / f"alone{number}" / "out"))
    assert alone[0] != alone[1]
    for pair in range(PAIRS):
        parent, gate = tmp_path / f"pair{pair}", forked.Barrier(2)
        parent.mkdir()
        logs = [tmp_path / f"pair{pair}-{number}.txt" for number in range(2)]
        children = [
            forked.Process(target=write, args=(verb, base, given, parent / "out", gate, log))
            for given, log in zip(adapters, logs, strict=True)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
        codes, logs_read = [child.exitcode for child in children], [log.read_text() for log in logs]
        assert sorted(codes) == [0, 1], logs_read
        assert digest(parent / "out") == alone[codes.index(0)], "the folder is not the one that its writer makes"
        loser = logs_read[codes.index(1)]
        assert loser.startswith("error: ") and loser.count("\n") == 1
        assert "another process is writing" in loser or "already there" in loser
        assert [path.name for path in parent.iterdir()] == ["out"]
