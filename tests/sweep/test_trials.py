"""trials.jsonl: what became of a job, whoever writes it and whatever cuts a line short."""

import json
import multiprocessing
from pathlib import Path

import pytest

from cqlora.errors import ConfigError, DoesNotFit, Preempted, Pruned, TrainingError
from cqlora.sweep.trials import TRIALS_FILE, State, hold_trial, is_held, read_trials, record_trial
from cqlora.system.metrics import append_metrics
from cqlora.system.signals import Stopped

FIELDS = {"number", "folder", "overrides", "state", "values", "error", "seconds", "time"}


def evaluate(folder: Path, step: int, *losses: float) -> None:
    """An evaluation of a source in each language, 10 tokens in the first and 30 in the second."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, tokens, loss in zip(("zh", "en"), (10, 30), losses, strict=False):
        row = {"kind": "eval", "step": step, "source": "wiki", "language": language, "loss": loss, "tokens": tokens}
        append_metrics(folder, row)


def record(sweep: Path, number: int, raised: BaseException | None = None) -> None:
    with record_trial(sweep, sweep / str(number), {"lora.rank": 4}):
        if raised is not None:
            raise raised


def test_a_finished_trial_has_its_last_whole_evaluation_under_the_names_of_the_metrics(tmp_path):
    evaluate(tmp_path / "3", 0, 9.0, 9.0)
    evaluate(tmp_path / "3", 5, 2.0, 4.0)
    evaluate(tmp_path / "3", 6, 1.0)
    record(tmp_path, 3)
    begun, ended = [json.loads(line) for line in (tmp_path / TRIALS_FILE).read_text().splitlines()]
    assert set(begun) == set(ended) == FIELDS
    assert (begun["state"], ended["state"], ended["folder"]) == ("running", "finished", "3")
    assert ended["values"]["eval/loss"] == pytest.approx((2.0 * 10 + 4.0 * 30) / 40)
    assert ended["values"]["eval/wiki/zh/loss"] == 2.0 and ended["error"] is None


def test_the_probe_is_among_a_trials_values_and_part_of_a_whole_evaluation(tmp_path):
    for step in (0, 5, 9):
        evaluate(tmp_path / "0", step, 2.0, 4.0)
        if step < 9:
            row = {"kind": "probe", "step": step, "source": "probe/translation", "language": "zh"}
            append_metrics(tmp_path / "0", row | {"loss": 3.0 - step / 10, "first_loss": 3.5, "gain": 0.5 + step / 10})
    record(tmp_path, 0)
    (trial,) = read_trials(tmp_path)
    assert trial.values["eval/probe/translation/zh/gain"] == 1.0
    assert trial.values["eval/loss"] == pytest.approx((2.0 * 10 + 4.0 * 30) / 40)


@pytest.mark.parametrize(
    "raised, state",
    [
        (TrainingError("it diverged."), State.failed),
        (RuntimeError("no\nsecond line"), State.failed),
        (DoesNotFit("too large."), State.refused),
        (Preempted("stopped by SIGTERM."), State.interrupted),
        (Stopped(15), State.interrupted),
        (SystemExit(75), State.interrupted),
        (Pruned("worse."), State.pruned),
    ],
)
def test_each_end_has_its_state_and_a_reason_in_one_line(raised, state, tmp_path):
    with pytest.raises(type(raised)):
        record(tmp_path, 0, raised)
    (trial,) = read_trials(tmp_path)
    assert trial.state is state and trial.error and "\n" not in trial.error


def test_a_line_that_a_kill_cut_short_is_skipped_by_readers_and_mended_by_the_next_writer(tmp_path):
    record(tmp_path, 0)
    file = tmp_path / TRIALS_FILE
    file.write_bytes(file.read_bytes() + b'{"number": 1, "fol')
    assert [trial.number for trial in read_trials(tmp_path)] == [0]
    record(tmp_path, 2)
    assert [(trial.number, trial.state) for trial in read_trials(tmp_path)] == [(0, "finished"), (2, "finished")]


def test_processes_that_write_at_once_lose_no_line_of_one_another(tmp_path):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=lambda first=first: [record(tmp_path, first + n) for n in range(25)])
                for first in (0, 100, 200)]  # fmt: skip
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [trial.number for trial in read_trials(tmp_path)] == [
        first + n for first in (0, 100, 200) for n in range(25)
    ]
    assert len((tmp_path / TRIALS_FILE).read_text().splitlines()) == 150


def test_a_job_is_one_processs_at_a_time_and_is_let_go_at_its_end(tmp_path):
    with hold_trial(tmp_path, 1):
        assert is_held(tmp_path, 1) and not is_held(tmp_path, 2)
        with pytest.raises(ConfigError, match="another process runs job 1"):
            record(tmp_path, 1)
    assert not is_held(tmp_path, 1)


def test_an_error_that_holds_a_secret_is_not_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("DB_PASS", "planted-in-the-environment")
    with pytest.raises(RuntimeError):
        record(tmp_path, 0, RuntimeError("cannot log in with planted-in-the-environment"))
    assert "planted-in-the-environment" not in (tmp_path / TRIALS_FILE).read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"number": None}, {"number": "0"}, {"number": 10**400}, {"number": True}, {"folder": None},
        {"folder": "x" * 5000},
        {"folder": "/etc"}, {"folder": "../.."}, {"overrides": None}, {"values": []}, {"values": {"a": "b"}},
        {"values": {"a": 10**400}}, {"error": 3}, {"state": "lost"},
    ],
    ids=str,
)  # fmt: skip
def test_a_line_that_is_no_trial_is_left_out_and_the_others_stand(tmp_path, change):
    whole = {"number": 0, "folder": "0", "overrides": {}, "state": "finished", "values": {"eval/loss": 1.0}}
    lines = [json.dumps(whole), json.dumps(whole | {"number": 1} | change)]
    (tmp_path / "trials.jsonl").write_text("\n".join(lines) + "\n")
    assert [trial.number for trial in read_trials(tmp_path)] == [0]
