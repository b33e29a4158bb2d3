"""The mix: who is held out, who is sampled, and that neither depends on the neighbours."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from cqlora.base import Base
from cqlora.config.choices import Deduplication, OasstPaths, SourceKind
from cqlora.config.schema import SourceConfig
from cqlora.data.cache import TokenCache, prepare_cache
from cqlora.data.keys import assign_splits, content_key, mix_keys
from tests.data.conftest import MakeConfig, write_jsonl


def texts(name: str, count: int) -> list[str]:
    rng = random.Random(name)
    return [f"{name} document {n}: " + " ".join(rng.choices("abcdefgh", k=20)) for n in range(count)]


def wiki(path: Path, rows: list[str], **settings: object) -> SourceConfig:
    write_jsonl(path, [{"text": text} for text in rows])
    return SourceConfig(kind=SourceKind.wiki, path=str(path), **settings)


def documents(cache: TokenCache, base: Base, split: str, source: str = "") -> list[str]:
    """Decoded documents of a split, of one source or of all."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base.tokenizer_file))
    found = []
    for number, info in enumerate(cache.sources):
        for pack in cache.splits[split].packs_of(number) if source in ("", info.name) else []:
            for ids in np.split(pack.token_ids, np.cumsum(pack.document_lengths)[:-1]):
                found.append(tokenizer.decode(ids.tolist()))
    return found


def test_split_shares_are_met_and_depend_on_the_document_alone():
    keys = np.array([content_key(f"document {n}") for n in range(20_000)], dtype=np.uint64)
    splits = assign_splits(keys, 0.1, 0.05)
    assert np.bincount(splits) / len(keys) == pytest.approx([0.85, 0.1, 0.05], abs=0.01)
    assert (assign_splits(keys[::-1], 0.1, 0.05)[::-1] == splits).all()
    larger = assign_splits(keys, 0.2, 0.05)
    assert (larger[splits == 1] == 1).all()


def test_content_keys_see_through_case_and_space():
    assert content_key("Hello  World\n") == content_key("hello world")
    assert content_key("hello world") != content_key("hello word")


def test_mixed_keys_are_the_same_on_every_machine():
    keys = np.array([1, 2, 3], dtype=np.uint64)
    assert mix_keys(keys, "sample", 1).tolist() == [
        13789377860088218956,
        16395366085507163635,
        15495192416467187378,
    ]


def test_no_document_changes_sides_with_the_seed_or_another_source(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig
):
    alone = {"a": wiki(tmp_path / "a.jsonl", texts("a", 300))}
    both = alone | {"b": wiki(tmp_path / "b.jsonl", texts("b", 300))}
    first = prepare_cache(make_config(alone, val_fraction=0.1), byte_base)
    second = prepare_cache(make_config(both, val_fraction=0.1, seed=7), byte_base)
    for split in ("train", "val"):
        assert set(documents(first, byte_base, split, "a")) == set(documents(second, byte_base, split, "a"))
    assert 15 <= first.splits["val"].documents <= 45


def test_sample_takes_the_same_documents_whatever_the_other_sources(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig
):
    sampled = wiki(tmp_path / "a.jsonl", texts("a", 400), sample=50)
    other = wiki(tmp_path / "b.jsonl", texts("b", 100))
    one, two, reseeded = (
        documents(
            prepare_cache(make_config(sources, val_fraction=0.0, seed=seed), byte_base),
            byte_base,
            "train",
            "a",
        )
        for sources, seed in (({"a": sampled}, 1), ({"b": other, "a": sampled}, 1), ({"a": sampled}, 2))
    )
    assert len(one) == 50
    assert set(one) == set(two)
    assert set(one) != set(reseeded)


def test_sample_of_a_long_source_equals_a_sample_of_its_whole_index(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig
):
    """The spool forgets candidates while reading; what is left must be the smallest hashes of all."""
    rows = texts("a", 9000)
    clean = {"deduplicate": Deduplication.none}
    config = make_config({"a": wiki(tmp_path / "a.jsonl", rows, sample=40)}, clean=clean, val_fraction=0.0)
    taken = documents(prepare_cache(config, byte_base), byte_base, "train")
    hashes = mix_keys(np.array([content_key(row) for row in rows], dtype=np.uint64), "sample", 1)
    assert set(taken) == {rows[n] for n in np.argsort(hashes)[:40]}


def test_sample_evenly_takes_the_same_number_from_every_source(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig
):
    sources = {name: wiki(tmp_path / f"{name}.jsonl", texts(name, 60)) for name in "abc"}
    cache = prepare_cache(make_config(sources, sample_evenly=50, val_fraction=0.0), byte_base)
    kept = [found["kept"]["train"] for found in cache.summary["sources"].values()]
    assert kept == [17, 17, 16]


def test_sample_tokens_stops_at_the_document_that_reaches_it(tmp_path: Path, byte_base: Base, make_config: MakeConfig):
    source = wiki(tmp_path / "a.jsonl", texts("a", 200), sample_tokens=2000)
    cache = prepare_cache(make_config({"a": source}, val_fraction=0.1), byte_base)
    tokens = cache.splits["train"].tokens
    longest = cache.summary["sources"]["a"]["longest"]
    assert 2000 <= tokens < 2000 + longest


@pytest.mark.parametrize(("weight", "low", "high"), [(0.5, 0.4, 0.6), (2.0, 2.0, 2.0), (2.5, 2.4, 2.6)])
def test_weight_keeps_a_share_or_repeats(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig, weight: float, low: float, high: float
):
    source = wiki(tmp_path / "a.jsonl", texts("a", 400), weight=weight)
    cache = prepare_cache(make_config({"a": source}, val_fraction=0.1), byte_base)
    split = cache.splits["train"]
    packed = [length for n in range(len(split)) for length in split.pack(n).document_lengths]
    available = 400 - cache.splits["val"].documents
    assert low * available <= len(packed) <= high * available
    assert sum(packed) == split.packed_tokens


def test_exact_duplicates_go_across_sources_and_held_out_text_leaves_training(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig
):
    rows = texts("a", 30)
    for split, part in (("train", rows), ("val", [rows[3].upper()]), ("test", ["held out for a test only"])):
        write_jsonl(tmp_path / "a" / f"{split}.jsonl", [{"text": text} for text in part])
    sources = {
        "a": SourceConfig(kind=SourceKind.wiki, path=str(tmp_path / "a")),
        "b": wiki(tmp_path / "b.jsonl", [*rows[5:10], "held out  for a TEST only", "something new altogether"]),
    }
    cache = prepare_cache(make_config(sources, val_fraction=0.0), byte_base)
    train = documents(cache, byte_base, "train")
    assert sorted(train) == sorted([row for row in rows if row != rows[3]] + ["something new altogether"])
    summary = cache.summary["sources"]
    assert summary["a"]["left_out"] == {"held out elsewhere": 1}
    assert summary["b"]["left_out"] == {"held out elsewhere": 1}
    assert summary["b"]["duplicates"] == 5

    kept = prepare_cache(make_config(sources, val_fraction=0.0, clean={"deduplicate": Deduplication.none}), byte_base)
    assert len(documents(kept, byte_base, "train")) == len(train) + 5
    assert kept.summary["sources"]["b"]["left_out"] == {"held out elsewhere": 1}


def test_a_split_that_repeats_its_training_is_set_aside(tmp_path: Path, byte_base: Base, make_config: MakeConfig):
    rows = texts("a", 10)
    for split in ("train", "val", "test"):
        write_jsonl(tmp_path / "a" / f"{split}.jsonl", [{"text": text} for text in rows])
    source = SourceConfig(kind=SourceKind.wiki, path=str(tmp_path / "a"))
    cache = prepare_cache(make_config({"a": source}), byte_base)
    train, val = (documents(cache, byte_base, split) for split in ("train", "val"))
    assert cache.summary["sources"]["a"]["own_split_set_aside"]
    assert len(val) >= 1
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(rows)


@pytest.mark.parametrize("clean", [{}, {"deduplicate": Deduplication.none}])
def test_a_sample_counts_what_trains_and_the_held_out_share_comes_on_top(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig, clean: dict[str, Deduplication]
):
    """The second source holds out by files of its own, so that only the first loses some to the hash."""
    rows = texts("b", 3500)
    for split, part in (("train", rows[:3400]), ("val", rows[3400:])):
        write_jsonl(tmp_path / "b" / f"{split}.jsonl", [{"text": text} for text in part])
    sources = {
        "a": wiki(tmp_path / "a.jsonl", texts("a", 3500)),
        "b": SourceConfig(kind=SourceKind.wiki, path=str(tmp_path / "b")),
    }
    config = make_config(sources, clean=clean, sample_evenly=300, val_fraction=0.3, test_fraction=0.3)
    summary = prepare_cache(config, byte_base).summary["sources"]
    assert [summary[name]["kept"]["train"] for name in "ab"] == [150, 150]
    assert 75 <= summary["a"]["kept"]["val"] <= 150
    assert summary["b"]["kept"]["val"] == 100
    for found in summary.values():
        left = sum(found["kept"].values()) + found["duplicates"] + sum(found["left_out"].values())
        assert left == found["read"] == 3500


def test_sample_tokens_counts_what_trains(tmp_path: Path, byte_base: Base, make_config: MakeConfig):
    source = wiki(tmp_path / "a.jsonl", texts("a", 800), sample_tokens=4000)
    cache = prepare_cache(make_config({"a": source}, val_fraction=0.5), byte_base)
    longest = cache.summary["sources"]["a"]["longest"]
    assert 4000 <= cache.splits["train"].tokens < 4000 + longest


def test_all_paths_of_a_tree_are_on_one_side(tmp_path: Path, byte_base: Base, make_config: MakeConfig):
    def reply(text: str, role: str, replies: list[dict[str, object]]) -> dict[str, object]:
        return {"message_id": text, "text": text, "role": role, "lang": "zh", "replies": replies}

    trees = [
        {"prompt": reply(f"prompt {n}", "prompter", [reply(f"answer {n}-{m}", "assistant", []) for m in range(4)])}
        for n in range(80)
    ]
    for tree in trees[::2]:
        tree["prompt"]["lang"] = "es"
    write_jsonl(tmp_path / "trees.jsonl", trees)
    settings = {"path": str(tmp_path / "trees.jsonl"), "oasst_paths": OasstPaths.all}
    source = SourceConfig(kind=SourceKind.oasst1, **settings)
    cache = prepare_cache(make_config({"a": source}, stage="sft", val_fraction=0.3), byte_base)
    sides = {
        split: {re.search(r"prompt \d+", text)[0] for text in documents(cache, byte_base, split)}  # type: ignore[index]
        for split in ("train", "val")
    }
    assert len(sides["val"]) > 10
    assert sides["train"] & sides["val"] == set()
    assert cache.summary["sources"]["a"]["further_records"] == 240

    wanted = SourceConfig(kind=SourceKind.oasst1, langs=["zh", "en"], **settings)
    found = prepare_cache(make_config({"a": wanted}, stage="sft"), byte_base).summary["sources"]["a"]
    assert (found["rejected"], found["dropped"]) == ({}, {"prompt in another language": 40})


def test_a_seed_task_with_one_bad_instance_is_rejected_as_a_whole(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig
):
    good = {"instruction": "写诗", "instances": [{"input": "夏", "output": "一"}, {"input": "秋", "output": "二"}]}
    bad = {"instruction": "唱歌", "instances": [{"input": "夏", "output": "三"}, {"input": "秋"}]}
    source = SourceConfig(kind=SourceKind.belle, path=str(write_jsonl(tmp_path / "a.jsonl", [good, bad])))
    config = make_config({"a": source}, stage="sft", val_fraction=0.0, max_rejected_fraction=0.5)
    cache = prepare_cache(config, byte_base)
    found = cache.summary["sources"]["a"]
    assert (found["read"], found["further_records"], found["rejected"]) == (2, 1, {"missing field output": 1})
    assert found["kept"]["train"] == 2
    assert not any("唱歌" in text for text in documents(cache, byte_base, "train"))
