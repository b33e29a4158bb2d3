"""The token cache: whole or absent, built once, the same bytes always, bad rows told and counted."""

import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cqlora.base import Base
from cqlora.config.choices import SourceKind, Template
from cqlora.config.schema import RunConfig, SourceConfig
from cqlora.data import build, cache, collect, digests, store, workers
from cqlora.data.cache import TokenCache, prepare_cache, unevaluated_sources
from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.data.digests import MEMORY, hash_files
from cqlora.errors import DataError
from cqlora.system.sealed import read_sealed
from cqlora.train.distributed import Worker
from tests.conftest import HANG_SECONDS
from tests.data.conftest import MakeConfig, sample_texts, write_jsonl

SAMPLE = {
    "sample_zh": SourceConfig(kind=SourceKind.wiki, language="zh"),
    "sample_en": SourceConfig(kind=SourceKind.wiki, language="en"),
}
DIALOGS = {"sample_dialog": SourceConfig(kind=SourceKind.dialog)}


def digest(folder: Path) -> str:
    """sha256 over all arrays of a cache, the summary and the rejections."""
    sha = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".bin", ".jsonl") or file.name == "summary.json":
            sha.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return sha.hexdigest()


@pytest.fixture
def no_builds(monkeypatch: pytest.MonkeyPatch):
    """Call it to make any further build an error."""

    def forbid() -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("built again")

        monkeypatch.setattr(cache, "build_cache", refuse)

    return forbid


def test_packs_hold_every_document_once_with_masks_and_lengths_that_agree(byte_base: Base, make_config: MakeConfig):
    made = prepare_cache(make_config(SAMPLE, length=512), byte_base)
    assert [(source.name, source.language) for source in made.sources] == [
        ("sample_zh", "zh"),
        ("sample_en", "en"),
    ]
    for split in made.splits.values():
        packs = [split.pack(n) for n in range(len(split))]
        assert sum(len(pack.token_ids) for pack in packs) == split.tokens
        assert sum(int(pack.label_mask.sum()) for pack in packs) == split.label_tokens
        assert sum(len(pack.document_lengths) for pack in packs) == split.documents
        for pack in packs:
            assert pack.token_ids.dtype == np.int64
            assert pack.label_mask.dtype == bool
            assert len(pack.token_ids) == sum(pack.document_lengths) <= 512
            starts = np.cumsum([0, *pack.document_lengths[:-1]])
            assert not pack.label_mask[starts].any()
            assert len(pack.source_ids) == len(pack.characters) == len(pack.bytes) == len(pack.document_lengths)
        with pytest.raises(IndexError):
            split.pack(len(split))


def test_packs_of_real_text_are_over_98_percent_full(tmp_path: Path, byte_base: Base, make_config: MakeConfig):
    """Articles and their paragraphs, so that lengths differ as they do in a corpus."""
    rows = [text for article in sample_texts() for text in (article, *article.split("\n"))]
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in rows])
    config = make_config({"a": SourceConfig(kind=SourceKind.wiki, path=str(file))}, length=2048)
    split = prepare_cache(config, byte_base).splits["train"]
    assert split.packed_tokens / (2048 * len(split)) > 0.98


def test_packs_mix_sources(byte_base: Base, make_config: MakeConfig):
    split = prepare_cache(make_config(SAMPLE, length=2048), byte_base).splits["train"]
    mixed = sum(len(set(split.pack(n).source_ids)) > 1 for n in range(len(split)))
    assert mixed > len(split) / 2


def test_evaluation_packs_hold_one_source_in_a_fixed_order_up_to_max_tokens(byte_base: Base, make_config: MakeConfig):
    made = prepare_cache(make_config(SAMPLE, length=512), byte_base)
    split = made.splits["val"]
    whole = [split.packs_of(source) for source in range(2)]
    assert {source for pack in whole[1] for source in pack.source_ids} == {1}
    assert sum(len(pack.token_ids) for packs in whole for pack in packs) == split.tokens
    some = split.packs_of(0, max_tokens=600)
    assert 600 <= sum(len(pack.token_ids) for pack in some) < 600 + 512
    again = prepare_cache(make_config(SAMPLE, length=512), byte_base).splits["val"].packs_of(0, max_tokens=600)
    assert all((a.token_ids == b.token_ids).all() for a, b in zip(some, again, strict=True))


def test_a_source_without_a_language_is_recognised_by_script(byte_base: Base, make_config: MakeConfig):
    made = prepare_cache(make_config(DIALOGS, stage="sft", length=1024), byte_base)
    assert {source.language for source in made.sources} >= {"zh", "en"}
    assert {source.name for source in made.sources} == {"sample_dialog"}
    ids = {source for n in range(len(made.splits["train"])) for source in made.splits["train"].pack(n).source_ids}
    assert ids <= set(range(len(made.sources)))


def test_bytes_are_the_same_on_one_core_and_on_two_by_either_encoder(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
):
    def start_at_once(self: workers.Workers, function: Any, tasks: Any) -> Iterator[Any]:
        if self._pool is None:
            self._start_processes(function)
        return iter(())

    monkeypatch.setattr(workers.Workers, "_until_processes", start_at_once)
    monkeypatch.setattr(collect, "_BATCH_BYTES", 20_000)
    monkeypatch.setattr(build, "_TASK_BYTES", 20_000)
    digests = set()
    for count, fast_bytes in ((1, 1 << 30), (1, 0), (2, 1 << 30), (2, 0)):
        monkeypatch.setattr(build, "FAST_BYTES", fast_bytes)
        made = prepare_cache(
            make_config(SAMPLE, cache_dir=str(tmp_path / f"{count}-{fast_bytes}"), workers=count), byte_base
        )
        digests.add((made.fingerprint, str(digest(made.folder))))
        assert not list(made.folder.glob("*.pickle"))
    assert len(digests) == 1


def test_several_shards_read_as_one(tmp_path: Path, byte_base: Base, make_config: MakeConfig, monkeypatch):
    whole = prepare_cache(make_config(SAMPLE), byte_base)
    monkeypatch.setattr(store, "SHARD_TOKENS", 5000)
    monkeypatch.setattr(build, "_TASK_BYTES", 4000)
    sharded = prepare_cache(make_config(SAMPLE, cache_dir=str(tmp_path / "sharded")), byte_base)
    assert len(list((sharded.folder / "train").glob("tokens-*.bin"))) > 3
    for name, split in whole.splits.items():
        for n in range(len(split)):
            one, other = split.pack(n), sharded.splits[name].pack(n)
            assert (one.token_ids == other.token_ids).all()
            assert (one.label_mask == other.label_mask).all()


def test_a_second_start_builds_nothing(byte_base: Base, make_config: MakeConfig, no_builds):
    config = make_config(SAMPLE)
    first = prepare_cache(config, byte_base)
    no_builds()
    second = prepare_cache(config, byte_base)
    assert second.fingerprint == first.fingerprint
    assert second.summary == first.summary


def changed(config: RunConfig, path: str, value: object) -> RunConfig:
    *nodes, key = path.split(".")
    target = config
    for node in nodes:
        target = target[node] if isinstance(target, dict) else getattr(target, node)
    setattr(target, key, value)
    return config


CHOICES = {
    "seed": 2,
    "data.val_fraction": 0.2,
    "data.sample_evenly": 10,
    "data.clean.min_characters": 20,
    "data.sources.sample_zh.sample": 5,
    "data.sources.sample_zh.language": "",
    "stage.sequence_length": 64,
}


@pytest.mark.parametrize("path", CHOICES)
def test_another_choice_is_another_cache(byte_base: Base, make_config: MakeConfig, path: str):
    import copy

    def fingerprint(config: RunConfig) -> str:
        Path(config.data.cache_dir).mkdir(exist_ok=True)
        places = cache.find_sources(config.data, config.stage.name)
        return cache.fingerprint_choices(config, byte_base, places, Path(config.data.cache_dir))

    plain = make_config(copy.deepcopy(SAMPLE))
    assert fingerprint(make_config(copy.deepcopy(SAMPLE), stage="sft")) != fingerprint(plain)
    same = make_config(copy.deepcopy(SAMPLE), workers=2, max_rejected_fraction=0.5)
    assert fingerprint(plain) == fingerprint(same)
    assert fingerprint(changed(make_config(copy.deepcopy(SAMPLE)), path, CHOICES[path])) != fingerprint(plain)


def test_another_content_or_tokenizer_is_another_cache(
    tmp_path: Path, byte_base: Base, llama_base: Base, make_config: MakeConfig
):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document number {n}"} for n in range(20)])
    config = make_config({"a": SourceConfig(kind=SourceKind.wiki, path=str(file))})
    first = prepare_cache(config, byte_base).fingerprint
    assert prepare_cache(config, llama_base).fingerprint != first
    moved = tmp_path / "elsewhere" / "a.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(file.read_bytes())
    config.data.sources["a"].path = str(moved)
    assert prepare_cache(config, byte_base).fingerprint == first
    write_jsonl(moved, [{"text": f"document number {n}!"} for n in range(20)])
    assert prepare_cache(config, byte_base).fingerprint != first


GB18030 = "GB18030 and not UTF-8, to which `iconv -f GB18030 -t UTF-8 FILE` converts"
BAD_ROWS = [
    (b'{"text": "this line is cut sho\n', "broken JSON"),
    (b"not json at all\n", "broken JSON"),
    ('{"text": "编码不对的一行文字"}\n'.encode("gb18030"), GB18030),
    (b'{"text": "caf\xe9 ol\xe9"}\n', "not UTF-8"),
    (b'{"title": "no text"}\n', "missing field text"),
    (b'["a list"]\n', "row is a list, not an object"),
    (b'{"text": null}\n', "field text is null, not text"),
    (b'{"text": "  "}\n', "field text is empty"),
    (b"[" * 100_000 + b"\n", "nested too deeply"),
    (b'{"text": "' + b"x" * (50 << 20) + b'"}\n', "line longer than 16 MiB"),
]


def write_with_bad_rows(file: Path, good: int) -> Path:
    lines = [json.dumps({"text": f"a good document, number {n}"}).encode() + b"\n" for n in range(good)]
    with file.open("wb") as stream:
        for line in lines[: good // 2]:
            stream.write(line)
        for bad, _ in BAD_ROWS:
            stream.write(bad)
        stream.writelines(lines[good // 2 :])
    return file


def test_bad_rows_are_reported_by_file_line_and_reason_and_the_rest_goes_on(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig
):
    file = write_with_bad_rows(tmp_path / "bad.jsonl", good=400)
    source = SourceConfig(kind=SourceKind.wiki, path=str(file))
    made = prepare_cache(make_config({"bad": source}), byte_base)
    rejected = [json.loads(line) for line in (made.folder / "rejected.jsonl").read_text().splitlines()]
    assert rejected == [
        {"source": "bad", "file": "bad.jsonl", "line": 201 + n, "reason": reason}
        for n, (_, reason) in enumerate(BAD_ROWS)
    ]
    summary = made.summary["sources"]["bad"]
    assert summary["read"] == 400 + len(BAD_ROWS)
    assert sum(summary["kept"].values()) == 400


def test_bad_conversations_are_rejected_and_the_rest_goes_on(tmp_path: Path, byte_base: Base, make_config: MakeConfig):
    def exchange(n: int) -> list[dict[str, str]]:
        return [{"role": "user", "text": f"q{n}"}, {"role": "assistant", "text": f"a{n}"}]

    rows = [exchange(n) for n in range(60)]
    rows[10] = []
    rows[20][0]["role"] = "narrator"
    file = write_jsonl(tmp_path / "talk.jsonl", rows)
    made = prepare_cache(
        make_config({"t": SourceConfig(kind=SourceKind.dialog, path=str(file))}, stage="sft"), byte_base
    )
    rejected = [json.loads(line) for line in (made.folder / "rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (11, "empty conversation"),
        (21, "unknown role narrator"),
    ]


def test_too_many_bad_rows_stop_with_a_summary_of_reasons(tmp_path: Path, byte_base: Base, make_config: MakeConfig):
    file = write_with_bad_rows(tmp_path / "bad.jsonl", good=40)
    config = make_config({"bad": SourceConfig(kind=SourceKind.wiki, path=str(file))})
    with pytest.raises(DataError, match=r"10 of 50 rows cannot be read \(broken JSON: 2, .*max_rejected_fraction=0.05"):
        prepare_cache(config, byte_base)
    cache_dir = Path(config.data.cache_dir)
    (kept,) = cache_dir.glob("*.rejected.jsonl")
    assert len(kept.read_text().splitlines()) == len(BAD_ROWS)
    assert not list(cache_dir.glob("*/cache.json"))
    assert not list(cache_dir.glob("*.partial"))
    config.data.max_rejected_fraction = 0.5
    assert prepare_cache(config, byte_base).splits["train"].documents > 30
    assert not list(cache_dir.glob("*.rejected.jsonl"))


def test_conversations_that_are_all_too_long_are_said_to_be(tmp_path: Path, byte_base: Base, make_config: MakeConfig):
    folder = tmp_path / "base"
    shutil.copytree(byte_base.path, folder)
    (folder / "chat_template.jinja").write_text("many words " * 99 + CHAT_TEMPLATE)
    turns = [{"from": "human", "value": "长江"}, {"from": "gpt", "value": "黄河"}]
    file = write_jsonl(tmp_path / "t.jsonl", [{"conversations": turns}] * 3)
    config = make_config({"t": SourceConfig(kind=SourceKind.sharegpt, path=str(file))}, stage="sft")
    config.stage.template = Template.base
    with pytest.raises(DataError, match=r"none is kept \(.*exchanges too long left out 1"):
        prepare_cache(config, replace(byte_base, path=folder))


def test_nothing_left_to_train_on_is_said_with_the_reasons(tmp_path: Path, byte_base: Base, make_config: MakeConfig):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "tiny"}] * 3)
    with pytest.raises(DataError, match=r"nothing to train on.*too short 3"):
        prepare_cache(make_config({"a": SourceConfig(kind=SourceKind.wiki, path=str(file))}), byte_base)


def test_a_damaged_cache_is_not_trusted(byte_base: Base, make_config: MakeConfig):
    config = make_config(SAMPLE)
    made = prepare_cache(config, byte_base)
    before = digest(made.folder)
    tokens = made.folder / "train" / "tokens-00000.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    assert digest(prepare_cache(config, byte_base).folder) == before
    (made.folder / "val" / "labels-00000.bin").unlink()
    assert digest(prepare_cache(config, byte_base).folder) == before


def flip(file: Path, place: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << int(place * 7)
    file.write_bytes(content)


def test_one_flipped_bit_in_any_file_of_a_cache_is_found_and_the_cache_built_anew(
    byte_base: Base, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
):
    config = make_config(SAMPLE, val_fraction=0.1)
    folder = prepare_cache(config, byte_base).folder
    before, manifest = digest(folder), (folder / "cache.json").read_bytes()
    names = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size]
    assert {"cache.json", "summary.json", "train/tokens-00000.bin", "val/pack_offsets.bin"} <= set(map(str, names))
    places = random.Random(5)
    for name in names:
        flip(folder / name, places.random())
        with caplog.at_level(logging.WARNING):
            assert prepare_cache(config, byte_base).folder == folder
        assert f"{name} is" in caplog.text and caplog.text.count("built anew") == 1
        assert digest(folder) == before and (folder / "cache.json").read_bytes() == manifest
        caplog.clear()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"files": 3}', b"[" * 100_000])
def test_a_manifest_or_a_memory_of_hashes_that_says_anything_else_is_made_anew(
    content: bytes, byte_base: Base, make_config: MakeConfig
):
    config = make_config(SAMPLE)
    made = prepare_cache(config, byte_base)
    before = digest(made.folder)
    (made.folder / "cache.json").write_bytes(content)
    (made.folder.parent / "file_hashes.json").write_bytes(content)
    again = prepare_cache(config, byte_base)
    assert again.folder == made.folder and digest(again.folder) == before


def test_a_damaged_memory_of_hashes_gives_no_other_fingerprint(byte_base: Base, make_config: MakeConfig):
    config = make_config(SAMPLE)
    first = prepare_cache(config, byte_base)
    memory = first.folder.parent / "file_hashes.json"
    content = memory.read_text()
    digit = re.search(r'": "([0-9a-f])', content)
    assert digit is not None
    memory.write_text(content[: digit.start(1)] + f"{int(digit[1], 16) ^ 1:x}" + content[digit.end(1) :])
    assert prepare_cache(config, byte_base).fingerprint == first.fingerprint


def test_a_digest_is_of_every_block_of_a_file_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digests, "BLOCK_BYTES", 1000)
    contents = [b"", b"x" * 1000, random.Random(1).randbytes(4321)]
    files = [tmp_path / str(number) for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    reported: list[int] = []
    found = digests.digest_files(files, reported.append)
    for file, content in zip(files, contents, strict=True):
        blocks = [content[start : start + 1000] for start in range(0, len(content), 1000)]
        joined = b"".join(hashlib.sha256(block).digest() for block in blocks)
        assert found[file] == hashlib.sha256(joined).hexdigest()
    assert reported[-1] == 5321 and reported == sorted(reported)


def test_only_the_first_worker_of_a_node_reads_the_whole_cache(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cpu")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert Worker(0, 1, device).leads_node and not Worker(1, 2, device).leads_node
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Worker(4, 8, device).leads_node
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert not Worker(3, 8, device).leads_node


PROGRAM = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
from cqlora.base import Base
from cqlora.config.choices import SourceKind, Template
from cqlora.config.schema import *
from cqlora.data import build, cache as caches, collect
from cqlora.data.cache import prepare_cache
from cqlora.system import durable
collect._BATCH_BYTES = build._TASK_BYTES = 20_000
file, folder, cache_dir, kill_at = sys.argv[1:]
shape = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), 8)
model = ModelConfig(name="t", path="unused", num_attention_heads=1, num_key_value_heads=1,
                    max_position_embeddings=4096, **shape)
data = DataConfig(name="t", root="", sources={"a": SourceConfig(kind=SourceKind.wiki, path=file)}, cache_dir=cache_dir,
                  workers=1)
stage = PretrainConfig(name="pretrain", sequence_length=128, global_batch_size=1)
config = RunConfig(model=model, data=data, stage=stage, hardware=HardwareConfig(name="t", micro_batch_size=1))
base = Base(path=Path(folder), config={"vocab_size": 8}, tokenizer_file=Path(folder) / "tokenizer.json",
            first_added_row=None, added_rows=0)
print("ready", flush=True)
built = []
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
def progress(what, done, total):
    if what == "checking":
        return
    built.append(what)
    print(what, done, flush=True)
    if str(len(built)) == kill_at:
        die()
if kill_at == "rename":
    durable.sync_tree = die
cache = prepare_cache(config, base, progress)
print("built" if built else "opened", cache.folder, flush=True)
"""


def start(file: Path, base: Base, cache_dir: Path, kill_at: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(file), str(base.path), str(cache_dir), kill_at],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = sample_texts()
    rows = [{"text": f"{n} {text}"} for n in range(2) for text in texts]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", rows)


def test_two_starts_at_once_build_it_once(tmp_path: Path, byte_base: Base, corpus: Path):
    programs = [start(corpus, byte_base, tmp_path / "cache") for _ in range(2)]
    last = [program.communicate(timeout=HANG_SECONDS)[0].splitlines()[-1] for program in programs]
    assert [program.returncode for program in programs] == [0, 0]
    assert sorted(line.split()[0] for line in last) == ["built", "opened"]
    assert len({line.split()[1] for line in last}) == 1


def test_a_kill_at_any_moment_leaves_nothing_that_a_later_run_trusts(tmp_path: Path, byte_base: Base, corpus: Path):
    whole = start(corpus, byte_base, tmp_path / "whole").communicate(timeout=HANG_SECONDS)[0].splitlines()
    expected = digest(Path(whole[-1].split()[1]))
    steps = len(whole) - 2
    rng = random.Random(11)
    for moment in (*map(str, rng.sample(range(1, steps + 1), 3)), "rename"):
        program = start(corpus, byte_base, tmp_path / "killed", moment)
        program.communicate(timeout=HANG_SECONDS)
        assert program.returncode == -signal.SIGKILL
        assert [file.parent.suffix for file in (tmp_path / "killed").glob("*/cache.json")] in ([], [".partial"])
    after = start(corpus, byte_base, tmp_path / "killed").communicate(timeout=HANG_SECONDS)[0].splitlines()[-1]
    assert after.startswith("built")
    assert digest(Path(after.split()[1])) == expected
    assert not list((tmp_path / "killed").glob("*.partial"))


def test_opening_imports_no_torch_and_no_transformers():
    heavy = "{'torch', 'transformers', 'datasets'}"
    code = f"import sys, cqlora.data.cache, cqlora.prepare; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_cache_is_typed_as_the_trainer_reads_it(byte_base: Base, make_config: MakeConfig):
    made: TokenCache = prepare_cache(make_config(DIALOGS, stage="sft", system_prompt="Be kind."), byte_base)
    assert made.folder.name == made.fingerprint[:32]
    assert set(made.splits) == {"train", "val", "test"}
    assert 0 < made.splits["train"].label_tokens < made.splits["train"].tokens


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"\xff", b"null", b'{"x": 5}', b"[" * 100_000])
def test_damaged_hashes_of_files_are_made_anew(tmp_path: Path, damaged: bytes):
    file = tmp_path / "a.txt"
    file.write_bytes(b"text")
    expected = hash_files([file], tmp_path)
    (tmp_path / MEMORY).write_bytes(damaged)
    assert hash_files([file], tmp_path) == expected == {file: hashlib.sha256(b"text").hexdigest()}
    assert list((read_sealed(tmp_path / MEMORY) or {}).values()) == [expected[file]]


def test_a_source_without_held_out_text_is_named(tmp_path: Path, byte_base: Base, make_config: MakeConfig):
    rows = [{"text": f"{number} {text}"} for number, text in enumerate(sample_texts())]
    sources = {
        "small": SourceConfig(kind=SourceKind.wiki, path=str(write_jsonl(tmp_path / "small.jsonl", rows[:3]))),
        "large": SourceConfig(kind=SourceKind.wiki, path=str(write_jsonl(tmp_path / "large.jsonl", rows[3:]))),
    }
    made = prepare_cache(make_config(sources, val_fraction=0.1), byte_base)
    kept = {name: found["kept"]["val"] for name, found in made.summary["sources"].items()}
    assert kept["large"] > 0 and unevaluated_sources(made) == [name for name, count in kept.items() if not count]
