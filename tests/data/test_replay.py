"""Replay: the share of training tokens that some sources give, counted in the cache itself."""

from pathlib import Path

import numpy as np
import pytest

from cqlora.base import Base
from cqlora.config.schema import SourceConfig
from cqlora.data.cache import TokenCache, prepare_cache
from cqlora.errors import ConfigError, DataError
from tests.data.conftest import MakeConfig
from tests.data.test_mix import documents, texts, wiki


def count_by_source(cache: TokenCache) -> dict[str, int]:
    """Training tokens of each source, over the packs as a run reads them."""
    counted = dict.fromkeys((source.name for source in cache.sources), 0)
    split = cache.splits["train"]
    for number in range(len(split)):
        pack = split.pack(number)
        for length, source in zip(pack.document_lengths, pack.source_ids, strict=True):
            counted[cache.sources[source].name] += length
    return counted


def sources(folder: Path, old: int = 300, **settings: object) -> dict[str, SourceConfig]:
    return {
        "new": wiki(folder / "new.jsonl", texts("new", 200), **settings),
        "old": wiki(folder / "old.jsonl", texts("old", old), replay=True),
    }


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9], ids=lambda share: f"share {share}")
@pytest.mark.parametrize("old", [30, 300], ids=["repeated", "left out"])
def test_replayed_sources_give_their_share_of_the_training_tokens(
    share: float, old: int, tmp_path: Path, byte_base: Base, make_config: MakeConfig
):
    cache = prepare_cache(make_config(sources(tmp_path, old), replay=share, val_fraction=0.1), byte_base)
    counted = count_by_source(cache)
    longest = max(found["longest"] for found in cache.summary["sources"].values())
    wanted = counted["new"] * share / (1 - share)
    assert abs(counted["old"] - wanted) <= longest / 2 + 1
    assert sum(counted.values()) == cache.splits["train"].packed_tokens


def test_what_is_not_replayed_is_the_same_with_and_without(tmp_path: Path, byte_base: Base, make_config: MakeConfig):
    alone = {"new": sources(tmp_path)["new"]}
    without = prepare_cache(make_config(alone, val_fraction=0.1), byte_base)
    cache = prepare_cache(make_config(sources(tmp_path), replay=0.3, val_fraction=0.1), byte_base)
    for split in ("train", "val"):
        assert documents(cache, byte_base, split, "new") == documents(without, byte_base, split, "new")


def test_a_larger_share_holds_a_smaller_one_and_held_out_text_stays(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig
):
    small, large = (
        prepare_cache(make_config(sources(tmp_path), replay=share, val_fraction=0.1), byte_base) for share in (0.1, 0.4)
    )
    assert set(documents(small, byte_base, "train", "old")) < set(documents(large, byte_base, "train", "old"))
    assert documents(small, byte_base, "val", "old") == documents(large, byte_base, "val", "old") != []


def test_two_replayed_sources_give_by_what_they_have_and_weights_of_others_count(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig
):
    mixed = sources(tmp_path, 200, weight=3.0) | {"more": wiki(tmp_path / "m.jsonl", texts("more", 100), replay=True)}
    counted = count_by_source(prepare_cache(make_config(mixed, replay=0.25, val_fraction=0.0), byte_base))
    total = sum(counted.values())
    assert (counted["old"] + counted["more"]) / total == pytest.approx(0.25, abs=0.005)
    assert counted["old"] / counted["more"] == pytest.approx(2, rel=0.1)


def test_processes_count_as_one_does(tmp_path: Path, byte_base: Base, make_config: MakeConfig):
    split = [
        prepare_cache(
            make_config(sources(tmp_path), replay=0.3, workers=workers, cache_dir=str(tmp_path / str(workers))),
            byte_base,
        ).splits["train"]
        for workers in (1, 2)
    ]
    assert np.array_equal(split[0].pack(0).token_ids, split[1].pack(0).token_ids)


def test_a_source_with_nothing_to_replay_is_an_error(tmp_path: Path, byte_base: Base, make_config: MakeConfig):
    mixed = sources(tmp_path) | {"old": wiki(tmp_path / "old.jsonl", ["short"], replay=True)}
    with pytest.raises(DataError, match="source old has nothing to replay"):
        prepare_cache(make_config(mixed, replay=0.3), byte_base)


@pytest.mark.parametrize(
    "settings, replay, told",
    [
        ({}, 0.0, "data.sources.old.replay=true has no effect without data.replay"),
        ({}, 0.99, "data.replay=0.99 is out of range"),
        ({"replay": True}, 0.2, "every source is replayed"),
        ({"replay": True, "weight": 2.0}, 0.2, "weight=2.0 has no effect without replay=false"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(
    settings: dict[str, object], replay: float, told: str, tmp_path: Path, make_config: MakeConfig
):
    with pytest.raises(ConfigError, match=told):
        make_config(sources(tmp_path, **settings), replay=replay)


def test_a_share_without_a_source_says_which_to_mark(tmp_path: Path, make_config: MakeConfig):
    with pytest.raises(ConfigError, match=r"mark one, as in data.sources.new.replay=true"):
        make_config({"new": sources(tmp_path)["new"]}, replay=0.2)
