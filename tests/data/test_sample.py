"""The bundled sample: whole, bilingual, and nothing of its held-out part in training."""

import json
from collections import Counter

from cqlora.data.keys import content_key
from cqlora.data.sources import SAMPLE_DIR

SPLITS = ("train", "val", "test")


def read(source: str, split: str) -> list[object]:
    lines = (SAMPLE_DIR / source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_passages_hold_out_the_same_ids_in_both_languages():
    for split in SPLITS:
        chinese, english = ([row["id"] for row in read(f"sample_{language}", split)] for language in ("zh", "en"))
        assert chinese == english
    ids = [row["id"] for split in SPLITS for row in read("sample_zh", split)]
    assert len(ids) == len(set(ids)) == 150


def test_no_text_stands_in_two_splits():
    for source in ("sample_zh", "sample_en", "sample_dialog"):
        keys = Counter()
        for split in SPLITS:
            rows = read(source, split)
            assert len(rows) >= 15
            keys.update({content_key(json.dumps(row.get("text") if isinstance(row, dict) else row)) for row in rows})
        assert max(keys.values()) == 1, source


def test_no_title_stands_in_training_and_outside_it():
    for language in ("zh", "en"):
        titles = {split: {row["title"] for row in read(f"sample_{language}", split)} for split in SPLITS}
        assert not titles["train"] & (titles["val"] | titles["test"])


def test_dialogues_end_with_the_assistant_in_both_languages_and_several_turns():
    dialogues = [row for split in SPLITS for row in read("sample_dialog", split)]
    assert len(dialogues) == 150
    assert all(row[-1]["role"] == "assistant" and all(m["text"].strip() for m in row) for row in dialogues)
    assert sum(len(row) > 3 for row in dialogues) >= 30
