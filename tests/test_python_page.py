"""docs/python.md is run as it stands, block after block, in a folder of its own and on the tiny model."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_python
from tests.runs import build_once
from tests.test_docs import code_blocks, in_chinese

PAGE = ROOT / "docs" / "python.md"

REPORT = """
from pathlib import Path
assert folder == Path("outputs/first").absolute(), folder
assert list(steps.index) == list(range(1, 21)) and steps["loss"].notna().all(), steps
assert list(held_out.index) == [0, 20] and held_out.notna().all(axis=None), held_out
assert held_out.columns.tolist() == [("sample_dialog", "en"), ("sample_dialog", "zh")], held_out
assert [model["name"] for model in record["models"]] == ["tiny", "tiny+first"]
assert (folder / "evaluation.json").is_file()
assert engine.encode_messages(messages) == inputs["input_ids"][0].tolist()
"""
"""What the page says of its names, and that both ways to load the adapter ask it the same."""


@pytest.fixture(scope="module")
def printed(workspace: Path) -> str:
    """What the page's blocks print."""
    script = "\n".join([*code_blocks(PAGE), REPORT])

    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "printed.txt").write_text(run_python(folder, "-c", script).stdout, encoding="utf-8")

    return (build_once(workspace / "python_page", build) / "printed.txt").read_text(encoding="utf-8")


def test_every_block_runs_and_prints_what_the_page_says(printed):
    said = re.findall(r"print\(error\)  # (.+)", "\n".join(code_blocks(PAGE)))
    assert len(said) == 1
    assert printed.splitlines()[0] == said[0]


def test_both_languages_have_the_same_code():
    assert code_blocks(PAGE) == code_blocks(in_chinese(PAGE))
