"""metrics.jsonl as damage leaves it: a line of other types is told and left out, and no reader falls over one."""

import json

import pytest

from cqlora.system.metrics import METRICS_FILE, evaluated_values, read_metrics, rewind_metrics

WHOLE = {"kind": "eval", "step": 0, "source": "a", "language": "zh", "loss": 2.0, "tokens": 10}


def write(folder, *rows):
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": "low"}, {"loss": None}, {"loss": [2]}, {"loss": True}, {"loss": 10**400}, {"tokens": "10"},
        {"tokens": -1}, {"tokens": None}, {"source": 5}, {"language": None}, {"step": True}, {"step": -1},
        {"step": 10**30}, {"kind": ["eval"]}, {"bits_per_byte": 10**400}, {"kind": "event"},
    ],
)  # fmt: skip
def test_an_evaluation_of_wrong_types_is_left_out(wrong, tmp_path, caplog):
    write(tmp_path, WHOLE, WHOLE | wrong)
    assert read_metrics(tmp_path) == [WHOLE]
    assert evaluated_values(tmp_path)[0]["eval/loss"] == 2.0
    assert "line 2 is damaged" in caplog.text


def test_a_loss_that_is_no_number_stands_by_its_name(tmp_path):
    write(tmp_path, WHOLE | {"loss": "nan"})
    assert read_metrics(tmp_path) == [WHOLE | {"loss": "nan"}]
    assert "eval/loss" not in evaluated_values(tmp_path)[0]


def test_half_a_character_is_kept_when_a_run_rewinds(tmp_path):
    event = {"kind": "event", "step": 1, "event": "note", "text": "\ud83d"}
    write(tmp_path, WHOLE, event, WHOLE | {"step": 9})
    rewind_metrics(tmp_path, 5)
    assert read_metrics(tmp_path) == [WHOLE, event]
    (tmp_path / METRICS_FILE).read_text(encoding="utf-8")
