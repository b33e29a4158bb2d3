"""The model card of an adapter: what hubs read of it, what it says of the run, and what it leaves out."""

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from cqlora.base import fingerprint_adapter, verify_adapter
from cqlora.config.schema import RunConfig
from cqlora.merge import MergeConfig, merge
from cqlora.model_card import adapter_page, hub_name, merged_page, page_of_merge
from cqlora.system.metrics import read_metrics
from tests.runs import finish_run, typed_run

HUB = "/home/user/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f"


def line(step: int, language: str, number: float, source: str = "wiki") -> dict:
    return {"kind": "eval", "step": step, "source": source, "language": language, "loss": 1.0, "tokens": 10,
            "bits_per_character": number, "bits_per_byte": number / 2}  # fmt: skip


ROWS = [
    line(0, "zh", 4.25), line(0, "en", 2.0), {"kind": "train", "step": 1, "loss": 1.0}, line(1, "zh", 4.0),
    line(1, "en", 1.5), line(2, "zh", 3.5), line(2, "en", 1.0),
]  # fmt: skip


@pytest.fixture(scope="module")
def config(workspace) -> RunConfig:
    return typed_run(workspace, "stage=sft", "stage.max_steps=2", "stage.system_prompt='请用中文回答。'")


def front_of(page: str) -> dict:
    return yaml.safe_load(page.split("---\n")[1])


def test_the_front_matter_is_what_a_hub_takes(config):
    config.model.path = HUB
    card = ModelCard(adapter_page(config, ROWS)).data.to_dict()
    assert card == front_of(adapter_page(config, ROWS))
    assert card["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    validate_repo_id(card["base_model"])
    assert card["library_name"] == "peft" and card["pipeline_tag"] == "text-generation"
    assert card["language"] == ["zh", "en"] and "lora" in card["tags"]
    assert "license" not in card, "whose value is the user's to say"
    assert "## Licence\n\nTo be filled in" in adapter_page(config, ROWS)


def test_a_base_from_elsewhere_is_named_in_words_alone(config):
    config.model.path = "/home/user/models/my_base"
    page = adapter_page(config, ROWS)
    assert "base_model" not in front_of(page) and "base: my_base, held in " in page
    assert not re.search(r"/home|user", page)
    assert hub_name("models/smollm2_135m") == hub_name("models--only") == ""


def test_the_table_is_of_the_first_and_the_last_evaluation(config):
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", adapter_page(config, ROWS), re.M)
    assert rows == [
        ("Chinese, bits per character (wiki)", "4.250", "3.500"), ("English, bits per byte (wiki)", "1.000", "0.500"),
    ]  # fmt: skip
    assert "No held-out text was scored" in adapter_page(config, ROWS[:3])


def test_recipe_mix_and_prompt_are_told(config):
    page = adapter_page(config, ROWS)
    for told in (
        "data: sample (", "lora, rank 4, alpha 32, layers all", "2 steps of 2 × ", "learning rate 0.0001", "seed ",
        "trained with: 请用中文回答。", "cqlora chat base=BASE adapter=ADAPTER",
    ):  # fmt: skip
        assert told in page


def test_a_runs_adapter_has_a_card_of_its_own_numbers_and_none_of_its_identity_depends_on_it(workspace, tmp_path):
    config = typed_run(workspace, "stage=sft", "stage.max_steps=1")
    assert finish_run(config, tmp_path) == 0
    adapter, rows = tmp_path / "adapter", read_metrics(tmp_path)
    page = (adapter / "README.md").read_text(encoding="utf-8")
    assert page == adapter_page(config, rows)
    last = [row for row in rows if row["kind"] == "eval"][-1]
    unit = {"zh": "bits_per_character", "en": "bits_per_byte"}[last["language"]]
    assert f"| {last[unit]:.3f} |" in page
    assert str(workspace) not in page and str(tmp_path) not in page
    before = fingerprint_adapter(adapter)
    (adapter / "README.md").write_text(page.replace("tags:", "license: apache-2.0\ntags:"), encoding="utf-8")
    verify_adapter(adapter)
    assert fingerprint_adapter(adapter) == before
    merge(MergeConfig(base=config.model.path, adapter=str(adapter), output_dir=str(tmp_path / "merged")))


def test_the_card_of_a_merged_model_has_both_stages_and_its_table(config, workspace):
    runs = [typed_run(workspace, "stage=pretrain", "stage.max_steps=2"), config]
    page = merged_page("my_base", runs, "| a | b |")
    assert front_of(page)["library_name"] == "transformers"
    assert "- pretrain: base: " in page and "- sft: base: " in page and "| a | b |" in page


def test_a_merge_of_a_merge_keeps_what_both_were_trained_on_and_the_licence_of_the_first_base():
    def told(what: str) -> str:
        return f"---\ntags: [cqlora]\nlanguage: [zh]\n---\n\n# x\n\n## Training\n\n- {what}\n\n## Use\n\nno\n"

    base = "---\nlicense: llama2\nbase_model: elsewhere/base\ntags: [text]\n---\n\n# B\n\n## Training\n\n- others\n"
    once = page_of_merge("once", Path(HUB), "transformers", base, [told("first")])
    twice = page_of_merge("twice", Path("models/once"), "", once, [told("second")])
    assert front_of(once)["base_model"] == "HuggingFaceTB/SmolLM2-135M" and "base_model" not in front_of(twice)
    assert front_of(once)["license"] == front_of(twice)["license"] == "llama2" and "## Licence" not in twice
    assert re.findall("^- (.*)$", once.split("---")[2], re.M) == ["first"]
    assert re.findall("^- (.*)$", twice.split("---")[2], re.M) == ["first", "second"]


@pytest.mark.parametrize("broken", ["---\n: [\n---\n", "---\n- a\n---\n", "---\nnever ended", "", "# no front"])
def test_a_base_whose_card_cannot_be_read_has_none(broken):
    page = page_of_merge("x", Path("models/x"), "transformers", broken, [])
    assert front_of(page)["library_name"] == "transformers" and "## Licence" in page
