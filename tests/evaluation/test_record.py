"""evaluation.json holds what was measured, the same each time, whole or not at all."""

import json
import math

import pytest
from rich.console import Console

from cqlora.errors import ConfigError, ModelError
from cqlora.evaluation import EvaluateConfig, evaluate_models, write_record
from cqlora.evaluation.table import show_record
from tests.evaluation.conftest import build_base


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    chinese, english = folder / "river_zh.jsonl", folder / "river_en.txt"
    rows = [{"text": text} for text in ("长江是亚洲最长的河流。", "河流很长，河水很多。", "亚洲有很多河流。")]
    chinese.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    english.write_text("The longest river is in Asia.\nAsia has many rivers.", encoding="utf-8")
    return [str(chinese), str(english)]


@pytest.fixture(scope="module")
def config(base, adapter, files):
    return EvaluateConfig(
        base=str(base), adapter=str(adapter), files=files, separator="\n", window=64, max_new_tokens=4
    )


@pytest.fixture(scope="module")
def record(config):
    return evaluate_models(config)


def test_the_record_has_the_agreed_form(record, base, adapter):
    assert set(record) == {"version", "settings", "models"} and record["version"] == 1
    first, second = record["models"]
    assert (first["name"], first["base"], first["adapters"]) == ("base", str(base), [])
    assert (second["name"], second["adapters"]) == ("base+run", [str(adapter)])
    assert [(row["source"], row["language"], row["documents"]) for row in first["text"]] == [
        ("river_zh", "zh", 3),
        ("river_en", "en", 2),
    ]
    for row in first["text"]:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        bits = row["loss"] * row["tokens"] / math.log(2)
        assert row["bits_per_character"] * row["characters"] == pytest.approx(bits)
        assert row["bits_per_byte"] * row["bytes"] == pytest.approx(bits)
        assert 0 < row["bits_per_character_error"] < row["bits_per_character"]
    assert [(row["pattern"], row["language"]) for row in first["probe"]] == [
        (pattern, language)
        for pattern in ("translation", "classification", "copying")
        for language in (("en", "zh") if pattern == "translation" else ("zh", "en"))
    ]
    assert all(len(row["losses"]) == 8 for row in first["probe"])
    assert len(first["generations"]) == 30
    assert "choice" not in first and first["form"] == "matrices in float32 on cpu"


def test_later_models_have_their_difference_to_the_first(record):
    first, second = record["models"]
    for row, other in zip(first["text"], second["text"], strict=True):
        assert "bits_per_character_difference" not in row
        difference = other["bits_per_character"] - row["bits_per_character"]
        assert other["bits_per_character_difference"] == pytest.approx(difference)
        assert other["text_sha256"] == row["text_sha256"]


def test_measuring_twice_gives_the_same_to_the_last_digit(config, record):
    assert evaluate_models(config) == record


def test_another_batch_size_gives_the_same_to_a_millionth(config, record, base, adapter, files):
    other = EvaluateConfig(
        base=str(base), adapter=str(adapter), files=files, separator="\n", window=64, batch_tokens=100,
        parts=["text", "probe"],
    )  # fmt: skip
    for ours, theirs in zip(record["models"], evaluate_models(other)["models"], strict=True):
        for row, same in zip(ours["text"], theirs["text"], strict=True):
            assert same["bits_per_character"] == pytest.approx(row["bits_per_character"], abs=1e-6)
        for row, same in zip(ours["probe"], theirs["probe"], strict=True):
            assert same["losses"] == pytest.approx(row["losses"], abs=1e-6)


def test_a_window_beyond_the_models_positions_is_refused(base, files):
    config = EvaluateConfig(base=str(base), files=files, parts=["text"], window=2048)
    with pytest.raises(ConfigError, match="window=2048 is beyond the 1024 positions"):
        evaluate_models(config)


def test_a_probe_that_does_not_fit_in_a_models_positions_is_refused(tmp_path):
    config = EvaluateConfig(base=str(build_base(tmp_path / "short", positions=64)), parts=["probe"])
    with pytest.raises(ModelError, match="holds 64 positions and the probe's examples take"):
        evaluate_models(config)


def test_the_file_is_replaced_whole_and_holds_what_json_knows(record, tmp_path):
    file = tmp_path / "new" / "evaluation.json"
    write_record(record, file)
    assert json.loads(file.read_text(encoding="utf-8")) == record
    write_record({"perplexity": math.inf, "rows": [{"loss": math.nan}]}, file)
    assert json.loads(file.read_text(encoding="utf-8")) == {"perplexity": None, "rows": [{"loss": None}]}
    assert [each.name for each in file.parent.iterdir()] == ["evaluation.json"]


def test_the_tables_tell_every_part_in_a_log(record, capsys):
    choice = {
        "task": "ceval", "shots": 5, "micro": 0.25, "micro_error": 0.01, "macro": 0.3, "macro_error": None,
        "first_prompt": "问题 [1]\n答案：", "subjects": {"law": {"accuracy": 0.2, "error": 0.02, "questions": 24}},
    }  # fmt: skip
    told = {**record, "models": [{**model, "choice": [choice]} for model in record["models"]]}
    show_record(Console(width=160), told)
    printed = capsys.readouterr().out
    bits = record["models"][1]["text"][0]
    assert f"{bits['bits_per_character']:.4f} ±" in printed
    assert f"({bits['bits_per_character_difference']:+.4f} ±" in printed
    for words in ("base+run", "river_zh (zh, 3 documents)", "copying (en)", "20 prompts (zh)", "0.2500 ±0.0100",
                  "law (24)", "问题 [1]\n答案：", "matrices in float32 on cpu"):  # fmt: skip
        assert words in printed, words


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "no model is given"),
        ({"base": "a", "models": ["b"]}, "base= and models= are both given"),
        ({"run": "a", "adapter": "b"}, r"adapter=\['b'\] has no effect without base=FOLDER"),
        ({"base": "a", "checkpoint": "step-00000050"}, "checkpoint=step-00000050 has no effect without run=FOLDER"),
        ({"base": "a", "parts": ["text", "prob"]}, "parts= has prob"),
        ({"base": "a", "parts": ["text", "text"]}, "names a part twice"),
        ({"base": "a", "parts": []}, r"parts=\[\] measures nothing"),
        ({"base": "a", "window": 8, "stride": 9}, "stride=9 is out of range; use a value from 1 to window=8"),
        ({"base": "a", "files": ["nowhere.txt"]}, "names nowhere.txt, which does not exist"),
        ({"base": "a", "shots": [5]}, r"shots=\[5\] has no effect without tasks="),
        ({"base": "a", "parts": ["probe"], "window": 9}, "window=9 has no effect without text among parts"),
        ({"base": "a", "parts": ["probe"], "max_new_tokens": 9}, "max_new_tokens=9 has no effect"),
        ({"base": "a", "dtype": "int8"}, "dtype=int8 is unknown"),
        ({"base": "a", "prompt_form": "poem"}, "prompt_form=poem is unknown"),
        ({"base": "a", "separator": "x"}, "separator=x has no effect without files="),
    ],
)
def test_what_cannot_be_measured_or_has_no_effect_is_refused(given, told):
    with pytest.raises(ConfigError, match=told):
        EvaluateConfig(**given)
