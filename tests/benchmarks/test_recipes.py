"""The comparison of recipes: what is held out, what a budget is, what is not computed again, and the table."""

import argparse
import importlib.util
import json
import re

import pytest
import yaml

from benchmarks import recipes
from cqlora.config.schema import ModelConfig
from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.data.sources import SAMPLE_DIR
from cqlora.model.tiny import build_tiny, read_sample_texts
from tests.cards import drop_card
from tests.conftest import ROOT, run_python, run_verb

KNOWN = yaml.safe_load((ROOT / "benchmarks" / "recipes.yaml").read_text(encoding="utf-8"))


def line(recipe: str, zh: float, en: float, seed: int = 1, budget: str = "60s", probe: float = 1.0) -> dict:
    return {
        "recipe": recipe, "seed": seed, "budget": budget, "clock": "processor", "steps": 10, "characters": 5000,
        "zh_bits_per_character": zh, "zh_bits_per_character_error": 0.01, "en_bits_per_byte": en, "probe": probe,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, amount, unit", [("60s", 60, "s"), ("1.5min", 90, "s"), ("2h", 7200, "s"), ("300ch", 300, "ch")]
)
def test_a_budget_is_a_time_or_a_number_of_characters(text, amount, unit):
    budget = recipes.Budget.parse(text)
    assert (budget.amount, budget.unit) == (amount, unit)
    assert recipes.Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("text", ["60", "0s", "-1s", "much", "5 min"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no budget; use 60s"):
        recipes.Budget.parse(text)


def test_the_same_tenth_of_each_file_is_held_out_and_no_document_of_it_trains(tmp_path):
    files = []
    for language in ("zh", "en"):
        files.append(tmp_path / f"{language}.jsonl")
        documents = [json.dumps({"text": f"document {language} {number % 400}"}) for number in range(500)]
        files[-1].write_text("\n".join(documents) + "\n")
    listed = []
    for folder in ("one", "two"):
        recipes.split_text(argparse.Namespace(folder=tmp_path / folder, files=files))
        text = tmp_path / folder / "text"
        listed.append((text / "held_out.txt").read_text())
        for language in ("zh", "en"):
            trains, held = (
                [json.loads(row)["text"] for row in file.read_text().splitlines()]
                for file in (text / "train" / f"wiki_{language}.jsonl", text / f"held_out_{language}.jsonl")
            )
            assert len(trains) + len(held) == 500 and 20 < len(held) < 90
            assert not set(trains) & set(held)
    assert listed[0] == listed[1] and len(listed[0].splitlines()) > 40


def test_the_table_has_means_over_seeds_the_best_first_and_all_against_the_base():
    lines = [
        line("base", 4.0, 1.0, seed=0, budget=""),
        line("worse", 3.9, 1.02),
        line("better", 3.5, 1.0), line("better", 3.7, 1.02, seed=2, probe=0.5),
    ]  # fmt: skip
    head, _, base, *rows = recipes.show_table(lines).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, base, *rows)]
    found = dict(zip(cells[0], cells[2], strict=True))
    assert [row[0] for row in cells[1:]] == ["untouched base", "`better`", "`worse`"]
    assert found["Chinese bits per character"] == "3.600 ± 0.100" and found["gain"] == "+0.400"
    assert found["English bits per byte"] == "1.010" and found["of the base's"] == "+1.0%"
    assert found["seeds"] == "2" and found["probe, of the base's"] == "-25.0%"


def test_a_line_that_was_cut_off_is_computed_again_and_a_whole_one_found(tmp_path):
    results = tmp_path / "results.jsonl"
    recipes.add_line(results, line("a", 1.0, 1.0))
    with results.open("a") as stream:
        stream.write('{"recipe": "b", "se')
    assert recipes.find_line(results, {"recipe": "a", "seed": 1, "budget": "60s"})
    assert not recipes.find_line(results, {"recipe": "a", "seed": 2, "budget": "60s"})
    recipes.add_line(results, line("b", 1.0, 1.0))
    assert [each["recipe"] for each in recipes.read_lines(results)] == ["a", "b"]


def test_what_a_step_takes_is_the_least_of_its_turns_and_of_steps_of_that_size(tmp_path):
    options = argparse.Namespace(folder=tmp_path, sequences=4, clock="wall", budget=recipes.Budget(60.0, "s"))
    for turn, wall, sequences in ((0, 3.0, 4), (1, 2.0, 4), (0, 1.0, 2)):
        recipes.add_line(
            tmp_path / recipes.PACES,
            {"recipe": "a", "turn": turn, "sequences": sequences, "wall": wall, "processor": 9.0, "ch": 700.0},
        )
    assert recipes.read_pace(options, "a") == 2.0
    options.budget = recipes.Budget(5000.0, "ch")
    assert recipes.read_pace(options, "a") == 700.0


@pytest.mark.parametrize("name", KNOWN)
def test_every_recipe_says_what_it_is_and_composes(name, tmp_path):
    recipe = KNOWN[name]
    assert recipe["about"] and set(recipe) <= {"about", "extend", "run", "trainer", "settings"}
    if "trainer" in recipe:
        return
    for verb, overrides in (("run", [*recipes.COMMON, *recipe["run"]]), ("extend", recipe["extend"])):
        if overrides:
            run_verb(tmp_path, verb, *overrides, "--cfg", "job")


@pytest.mark.skipif(importlib.util.find_spec("cqlora.evaluate") is None, reason="there is no cqlora evaluate yet")
def test_a_comparison_of_seconds_runs_to_its_end_and_once_more_computes_nothing(tmp_path):
    # Of the shape of model=tiny, with positions for the probe's examples.
    shape = ModelConfig(
        name="tiny", path=str(tmp_path / "base"), vocab_size=2048, hidden_size=64, intermediate_size=176,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    base = drop_card(build_tiny(shape, read_sample_texts(SAMPLE_DIR), CHAT_TEMPLATE))
    files = [SAMPLE_DIR / f"sample_{language}" / "train.jsonl" for language in ("zh", "en")]
    command = [
        ROOT / "benchmarks" / "recipes.py", base, *files, "--smoke", "--budget", "4000ch", "--recipes", "no_vocabulary",
        "recipe_2023", "--folder", tmp_path / "out", "--characters", "400",
    ]  # fmt: skip
    told = [run_python(tmp_path, *command).stdout for _ in range(2)]
    lines = [json.loads(row) for row in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [each["recipe"] for each in lines] == ["base", "no_vocabulary", "recipe_2023"]
    assert all(each["processor_seconds"] > 0 and 2000 < each["characters"] < 8000 for each in lines[1:])
    assert "no_vocabulary, seed 1, 4000ch" in told[0] and "seed" not in told[1].partition("|")[0]
    assert (tmp_path / "out" / "recipes.svg").read_text().startswith("<?xml")


def test_the_chinese_page_has_the_english_pages_table_in_chinese():
    def table(page):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        return text.partition("<!-- recipes: begin -->\n")[2].partition("\n<!-- recipes: end -->")[0]

    translated = recipes.translate(table("recipes.md"))
    assert translated == table("recipes.zh-CN.md") and not re.search("recipe \\|| gain | seeds |untouched", translated)
