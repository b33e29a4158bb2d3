"""`make recipe`: the table and the card of a record, and both stages on the tiny model."""

import importlib.util
import json

import pytest

from tests.conftest import ROOT, run_python, run_verb
from tests.test_scripts import load_script


def model(zh: float, gain: float, share: float) -> dict:
    text = {"source": "s", "bits_per_character": zh, "bits_per_character_error": 0.1, "bits_per_byte": zh / 3,
            "bits_per_byte_error": 0.05}  # fmt: skip
    return {
        "text": [text | {"language": "zh"}, text | {"language": "en"}],
        "probe": [{"pattern": "copying", "language": "zh", "gain": gain}],
        "generations": [{"language": "zh", "language_share": share}, {"language": "zh", "language_share": 1.0}],
    }


def test_the_table_has_a_column_for_the_base_and_for_each_stage():
    record = {"models": [model(4.2, 1.5, 0.0), model(3.6, 1.25, 0.5), model(3.9, 1.0, 1.0)]}
    head, _, *rows = load_script("recipe").show_table(record).splitlines()
    assert head == "| | base | pretrained | then tuned |"
    assert rows == [
        "| Chinese, bits per character (s) | 4.200 ± 0.100 | 3.600 ± 0.100 | 3.900 ± 0.100 |",
        "| English, bits per byte (s) | 1.400 ± 0.050 | 1.200 ± 0.050 | 1.300 ± 0.050 |",
        "| probe, copying (zh): gain in context | 1.50 | 1.25 | 1.00 |",
        "| replies in Chinese where asked in it | 50% | 75% | 100% |",
    ]


@pytest.mark.skipif(importlib.util.find_spec("cqlora.evaluate") is None, reason="there is no cqlora evaluate yet")
def test_both_stages_are_trained_evaluated_and_merged_with_a_card(tmp_path):
    run_verb(tmp_path, "prepare", "stage=pretrain", "model=tiny", f"data.cache_dir={tmp_path}/cache",
             "model.max_position_embeddings=4096")  # fmt: skip
    script = (ROOT / "scripts" / "recipe.py", "--minutes", "0.05", "--base", "models/tiny", "--model", "tiny")
    run_python(tmp_path, *script)
    folder = tmp_path / "outputs" / "recipe"
    assert len(json.loads((folder / "evaluation.json").read_text())["models"]) == 3
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n") and "| then tuned |" in card
    assert "- pretrain: base: tiny" in card and "- sft: base: tiny" in card
    assert "is there already; move it away" in run_python(tmp_path, *script, expect=1).stderr
