"""Near duplicates: found where they are, and only where the texts themselves say so."""

import random
from pathlib import Path

import numpy as np
import pytest

from cqlora.base import Base
from cqlora.config.choices import Deduplication, SourceKind
from cqlora.config.schema import SourceConfig
from cqlora.data.cache import prepare_cache
from cqlora.data.duplicates import SHINGLE, candidate_pairs, choose_bands, jaccard, shingle_hashes
from tests.data.conftest import MakeConfig, sample_texts, write_jsonl


def true_jaccard(first: str, second: str) -> float:
    sets = [
        {folded[n : n + SHINGLE] for n in range(max(1, len(folded) - SHINGLE + 1))}
        for folded in ("".join(text.casefold().split()) for text in (first, second))
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edit(text: str, rng: random.Random, edits: int) -> str:
    letters = list(text)
    for _ in range(edits):
        letters[rng.randrange(len(letters))] = "改"
    return "".join(letters)


def test_similarity_is_that_of_the_sets_of_five_grams():
    rng = random.Random(0)
    for text in sample_texts()[::30]:
        changed = edit(text, rng, 10)
        assert jaccard(shingle_hashes(text), shingle_hashes(changed)) == pytest.approx(true_jaccard(text, changed))
    assert jaccard(shingle_hashes("ab"), shingle_hashes("AB ")) == 1.0


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_nearly_every_pair_at_the_threshold(threshold: float):
    bands, rows = choose_bands(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.98


def test_candidates_share_a_band_with_the_first_of_its_bucket():
    signatures = np.array([[1, 9], [2, 8], [1, 8], [1, 7]], dtype=np.uint64)
    assert candidate_pairs(signatures).tolist() == [[0, 2], [1, 2], [0, 3]]


def test_training_text_nearly_that_of_a_held_out_one_goes_and_every_drop_is_above_the_threshold(
    tmp_path: Path, byte_base: Base, make_config: MakeConfig
):
    pytest.importorskip("rensa")
    rng = random.Random(5)
    base = [text for text in sample_texts() if len(text) > 300][:40]
    light = [edit(text, rng, len(text) // 150) for text in base[:10]]
    heavy = [edit(text, rng, len(text) // 12) for text in base[10:20]]
    assert all(true_jaccard(*pair) >= 0.8 for pair in zip(base, light, strict=False))
    assert all(true_jaccard(*pair) < 0.8 for pair in zip(base[10:], heavy, strict=False))
    held_out = [edit(text, rng, len(text) // 150) for text in base[20:25]]
    for split, texts in (("train", base + light + heavy), ("val", held_out)):
        write_jsonl(tmp_path / "a" / f"{split}.jsonl", [{"text": text} for text in texts])
    source = SourceConfig(kind=SourceKind.wiki, path=str(tmp_path / "a"))
    config = make_config({"a": source}, clean={"deduplicate": Deduplication.near}, length=4096)
    summary = prepare_cache(config, byte_base).summary["sources"]["a"]
    assert summary["near_duplicates"] == 15
    assert summary["kept"] == {"train": 45, "val": 5, "test": 0}
