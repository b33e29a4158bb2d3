"""What a page says of a folder, whole or damaged."""

import fcntl
import json
import math
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cqlora.config.run_yaml import LOCK_FILE, load_run_yaml
from cqlora.errors import ConfigError
from cqlora.plan.memory import plan_memory
from cqlora.plan.workload import Rows
from cqlora.report.page import describe
from cqlora.report.runs import describe_run, to_json, to_override
from cqlora.report.sweeps import describe_sweep
from tests.report.folders import write_run, write_sweep


def test_settings_that_were_chosen_are_told_from_those_that_were_not(tmp_path):
    run = describe_run(write_run(tmp_path / "run", ("lora.rank=32", "stage.learning_rate=3e-4")))
    changed = {
        setting["key"]: (setting["value"], setting["default"]) for setting in run["settings"] if setting["changed"]
    }
    assert changed == {"lora.rank": (32, 16), "stage.learning_rate": (3e-4, 2e-4)}


def test_the_plan_beside_the_measured_peak_is_the_planners(tmp_path):
    folder = write_run(tmp_path / "run")
    config = load_run_yaml(folder / "run.yaml")
    assert describe_run(folder)["planned_gib"] == pytest.approx(plan_memory(config, Rows(2048)).peak / 2**30)


def test_states_are_what_became_of_a_run(tmp_path):
    ended = write_run(tmp_path / "ended")
    stopped = write_run(tmp_path / "stopped", ended=False)
    assert describe_run(ended)["state"] == "finished" and describe_run(stopped)["state"] == "stopped"
    with (stopped / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert describe_run(stopped)["state"] == "running"
    with (stopped / "metrics.jsonl").open("a") as record:
        record.write(json.dumps({"kind": "event", "step": 60, "event": "preempted"}) + "\n")
    assert describe_run(stopped)["state"] == "interrupted"


def test_a_damaged_file_takes_its_own_part_away_and_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "run.yaml").write_text("model: [", encoding="utf-8")
    (folder / "evaluation.json").write_text("{", encoding="utf-8")
    run = describe_run(folder)
    assert run["values"]["train/tokens"] == 60 * 1024 and "settings" not in run and run["evaluation"] is None
    assert [name for note in run["notes"] for name in ("run.yaml", "evaluation.json") if name in note] == [
        "run.yaml", "evaluation.json",
    ]  # fmt: skip


def test_rows_of_an_evaluation_that_are_no_objects_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    models = [{"name": 5, "text": [1, {"source": "a"}], "probe": "x", "choice": None}, "model"]
    (folder / "evaluation.json").write_text(json.dumps({"version": 1, "models": models}), encoding="utf-8")
    assert describe_run(folder)["evaluation"] == [{"name": "5", "text": [{"source": "a"}]}]


def test_numbers_that_no_page_holds_are_no_values(tmp_path):
    trial = '"folder": "0", "state": "failed", "values": {"a": NaN, "b": 1e999, "d": 2}, "overrides": {"x": Infinity}'
    (tmp_path / "trials.jsonl").write_text(f'{{"number": 0, {trial}}}\n')
    page = describe_sweep(tmp_path)
    assert page["runs"][0]["values"] == {"d": 2} and page["runs"][0]["overrides"] == {"x": None}
    assert json.loads(to_json(page))


def test_a_sweep_shows_failed_and_unbegun_runs_and_what_differs(tmp_path):
    page = describe_sweep(write_sweep(tmp_path / "sweep"))
    assert [run["state"] for run in page["runs"]] == ["finished"] * 3 + ["failed"] + ["finished"] * 7 + ["running"]
    assert page["runs"][3]["error"].startswith("the loss was") and page["runs"][11]["values"] == {}
    assert page["differing"] == ["stage.learning_rate", "lora.rank"]
    assert page["runs"][4]["differing"] == {"lora.rank": 8, "stage.learning_rate": 3e-4}


def test_a_sweep_without_a_record_is_read_from_its_folders_by_number(tmp_path):
    for number in (10, 9):
        write_run(tmp_path / str(number), steps=3)
    assert [run["number"] for run in describe([tmp_path])["runs"]] == [9, 10]


def test_a_moved_sweep_still_finds_its_runs(tmp_path):
    write_sweep(tmp_path / "before", runs=2, steps=3).rename(tmp_path / "after")
    assert math.isfinite(describe_sweep(tmp_path / "after")["runs"][0]["values"]["train/loss"])


def test_folders_that_hold_neither_run_nor_sweep_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds neither a run nor a sweep"):
        describe([tmp_path])
    with pytest.raises(ConfigError, match="does not exist"):
        describe([tmp_path / "no"])


def test_json_cannot_end_the_element_that_it_stands_in():
    text = to_json({"name": "</script><!--<script>\u2028"})
    assert "<" not in text and "\u2028" not in text and json.loads(text)["name"] == "</script><!--<script>\u2028"


def test_the_command_that_goes_on_with_a_run_composes_to_the_same_run(tmp_path):
    overrides = ("lora.rank=32", "stage.learning_rate=3e-4", "lora.target_modules=[q_proj,v_proj]", "data.workers=2")
    folder = write_run(tmp_path / "my run's", overrides, ended=False)
    words = shlex.split(describe_run(folder)["commands"]["resume"])
    assert words[:2] == ["cqlora", "run"] and words[-1] == f"hydra.run.dir={folder}"
    again = write_run(tmp_path / "again", tuple(word for word in words[2:-1] if word != "stage=pretrain"))
    assert load_run_yaml(again / "run.yaml") == load_run_yaml(folder / "run.yaml")


@pytest.mark.parametrize("value", ["a b", "it's", "a\\'b", "中文", "1e3", "true", "", [1, "x y"], True, None, 2.5])
def test_a_value_is_written_as_hydra_reads_it(value):
    (override,) = OverridesParser.create().parse_overrides([f"key={to_override(value)}"])
    read = override.value()
    plain = [getattr(each, "text", each) for each in read] if isinstance(read, list) else getattr(read, "text", read)
    assert plain == value and type(plain) is type(value)
