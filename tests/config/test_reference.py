"""Every key has a meaning, in both languages; the pages of keys and `--help` are made of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cqlora.cli import VERBS
from cqlora.config.reference import SCHEMAS, list_entries, load_schema, render_page
from tests.conftest import ROOT

DOCS = ROOT / "docs"
MEANINGS = DOCS / "configuration.zh-CN.yaml"


def chinese() -> dict[str, str]:
    return yaml.safe_load(MEANINGS.read_text(encoding="utf-8"))


def all_entries():
    return [entry for verb in SCHEMAS for entry in list_entries(load_schema(verb))]


def test_every_verb_has_a_schema_whose_keys_all_have_a_docstring():
    assert set(SCHEMAS) == set(VERBS)
    assert not [entry.field for entry in all_entries() if len(entry.meaning) < 4]


def test_every_key_has_a_chinese_meaning_and_none_is_left_over():
    meanings, fields = chinese(), {entry.field for entry in all_entries()}
    assert not fields - set(meanings), "say these in docs/configuration.zh-CN.yaml"
    assert not set(meanings) - fields, "these are keys no longer"
    assert all(
        any("\u4e00" <= character <= "\u9fff" for character in text) or "LoRA" in text for text in meanings.values()
    )


@pytest.mark.parametrize("language, name", [("en", "configuration.md"), ("zh", "configuration.zh-CN.md")])
def test_the_page_of_keys_is_what_the_schemas_say(language, name):
    written = (DOCS / name).read_text(encoding="utf-8")
    wanted = render_page(language, chinese())
    assert written == wanted, f"type `python -m cqlora.config.reference {language} > docs/{name}`"


def test_a_page_names_type_default_and_meaning_of_a_key():
    page = render_page("en", {})
    assert "| `lora.rank` | integer | `16` | Rank of the adapter's matrices. |" in page
    assert "| `stage.max_steps` | integer or null | `null` | Optimizer steps; null trains for epochs. |" in page
    assert "| `base` | text | required |" in page


def test_each_verbs_help_shows_its_own_keys_and_groups_and_loads_nothing_heavy(tmp_path: Path):
    groups = {"run": "model:", "plan": "hardware:", "prepare": "data:", "convert": "vocab:", "extend": "vocab:"}
    code = (
        "import contextlib, importlib, sys\n"
        "for verb in sys.argv[1:]:\n"
        "    sys.argv = [verb, '--help']\n"
        "    module = importlib.import_module(f'cqlora.{verb}')\n"
        "    program = importlib.import_module(f'cqlora.{verb}.__main__') if hasattr(module, '__path__') else module\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        program.main()\n"
        "    print('LOADED', sorted({'torch', 'transformers', 'wandb', 'peft'} & set(sys.modules)), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *VERBS], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    *told, rest = done.stdout.split("LOADED []\n")
    assert len(told) == len(VERBS) and not rest, (rest, done.stderr)
    for verb, shown in zip(VERBS, told, strict=True):
        for entry in list_entries(load_schema(verb)):
            assert f"\n  {entry.key}  (" in shown, (verb, entry.key)
        assert ("experiment:" in shown) == (verb in ("run", "plan", "prepare"))
        assert groups.get(verb, "Keys") in shown and "schema/" not in shown
    assert not list(tmp_path.iterdir())


def test_ones_own_groups_are_among_the_choices_of_help(tmp_path: Path):
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "novels.yaml").write_text("name: novels\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "cqlora.run", "--help", "--config-dir", "mine"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "novels" in done.stdout, done.stderr
