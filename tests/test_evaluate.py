"""`cqlora evaluate` as it is typed: a record, a table, and mistakes in one sentence."""

import json
from pathlib import Path

import pytest

from cqlora.evaluate import read_sample_group
from tests.conftest import run_verb
from tests.runs import build_once, finish_run, typed_run

QUICK = ("window=128", "characters=300", "max_new_tokens=2")


@pytest.fixture(scope="module")
def run(workspace: Path) -> Path:
    """A run of two steps on the tiny model, with a checkpoint after each."""
    config = typed_run(
        workspace, "stage=pretrain", "stage.max_steps=2", "stage.epochs=null", "stage.checkpoint_every_steps=1"
    )

    def build(folder: Path) -> None:
        assert finish_run(config, folder) == 0

    return build_once(workspace / "evaluated_run", build)


def test_a_run_is_compared_with_its_base_on_its_own_validation_text(run, workspace):
    printed = run_verb(workspace, "evaluate", f"run={run}", *QUICK).stdout
    record = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    base, trained = record["models"]
    assert (base["adapters"], trained["adapters"]) == ([], [str(run / "adapter")])
    assert base["form"] == trained["form"] == "NF4 numbers unpacked to float32 on cpu"
    assert {row["source"] for row in base["text"]} == {"sample_zh", "sample_en"}
    assert f"{trained['text'][0]['bits_per_character']:.4f}" in printed and "evaluation.json" in printed


def test_a_checkpoint_is_evaluated_into_a_file_of_its_own(run, workspace, tmp_path):
    file = tmp_path / "first_step.json"
    run_verb(workspace, "evaluate", f"run={run}", "checkpoint=step-00000001", "parts=[probe]", f"output={file}")
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["models"][1]["name"] == "tiny+evaluated_run/step-00000001"
    assert record["models"][1]["adapters"] == [str(run / "checkpoints" / "step-00000001")]
    assert "text" not in record["models"][0]


def test_the_sample_is_scored_where_nothing_else_is_given(run, workspace):
    run_verb(workspace, "evaluate", "base=models/tiny", "parts=[text]", *QUICK[:2], "hydra.run.dir=evaluated/sample")
    record = json.loads((workspace / "evaluated" / "sample" / "evaluation.json").read_text(encoding="utf-8"))
    assert {row["source"] for row in record["models"][0]["text"]} == set(read_sample_group().sources) - {
        "sample_dialog"
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "error: no model is given; use one of base=FOLDER"),
        (["base=models/nowhere"], "error: model folder models/nowhere does not exist"),
        (["base=models/tiny", "windo=3"], "did you mean window?"),
        (["run=models/tiny"], "run.yaml does not exist"),
        (["base=models/tiny", "output=models/tiny/config.json"], "was not written by `cqlora evaluate`"),
        (["base=models/tiny", "parts=[prob]", "files=[models]"], "parts= has prob; use some of"),
        (["base=models/tiny", "output=/proc/nowhere/a.json"], "/proc/nowhere could not be read or written"),
    ],
)
def test_mistakes_are_told_in_one_sentence_and_leave_no_folder(arguments, told, run, workspace):
    done = run_verb(workspace, "evaluate", *arguments, expect=1 if "/nowhere" in str(arguments) else 2)
    assert told in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout
    assert not (workspace / "outputs" / "evaluate").exists()
