"""A run's record in the numbers that a page shows."""

import math

import pytest

from cqlora.report.columns import unpack_column
from cqlora.report.record import (
    describe_curves,
    describe_evaluations,
    describe_events,
    describe_replies,
    describe_values,
    join_languages,
)
from cqlora.system.metrics import read_metrics
from tests.report.folders import evaluations, replies, write_run


@pytest.fixture
def rows(tmp_path):
    return read_metrics(write_run(tmp_path / "run"))


def test_bits_of_a_language_are_all_its_sources_bits_over_all_their_characters():
    joined = join_languages(evaluations(0, 4.0))
    # wiki_zh: 4 bits on 1,500 characters, news: 2 bits on 4,000.
    assert joined["zh/bits_per_character"] == pytest.approx((4 * 1500 + 2 * 4000) / 5500)
    assert joined["zh/bits_per_byte"] == pytest.approx((4 * 1500 + 2 * 4000) / (3 * 5500))
    assert joined["en/bits_per_byte"] == pytest.approx(1.0)
    bits = (4 * 1500 + 2 * 4000 + 1 * 3200) * math.log(2)
    assert joined["loss"] == pytest.approx(bits / (1000 + 500 + 800))


def test_a_gain_is_what_the_run_took_off_its_first_evaluation(rows):
    values = describe_values(rows)
    before, after = join_languages(evaluations(0, 4.0)), join_languages(evaluations(60, 3.5))
    for key in after:
        assert values[f"eval/{key}"] == pytest.approx(after[key])
        assert values[f"eval/{key}/gain"] == pytest.approx(before[key] - after[key])


def test_training_values_are_the_last_lines_the_sum_of_seconds_and_the_highest_peak(rows):
    rows[10]["peak_memory_gib"] = 2.5
    values = describe_values(rows)
    assert values["train/tokens"] == 60 * 1024 and values["train/seconds"] == pytest.approx(30.0)
    assert values["train/peak_memory_gib"] == 2.5 and values["train/tokens_per_second"] == 1001


def test_curves_have_every_line_and_the_time_it_stood_at(rows):
    curves = describe_curves(rows, 1000)
    columns = {name: unpack_column(column) for name, column in curves["columns"].items()}
    assert curves["points"] == curves["lines"] == 60
    assert list(columns["step"]) == list(range(1, 61))
    assert list(columns["elapsed"]) == [0.5 * step for step in range(1, 61)]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert columns["loss"] == pytest.approx(losses)


def test_evaluations_stand_by_source_and_language_with_the_tokens_seen_by_then(rows):
    describe_curves(rows, 1000)
    series = describe_evaluations(rows)
    assert [(one["source"], one["language"]) for one in series] == [
        ("wiki_zh", "zh"),
        ("news", "zh"),
        ("wiki_en", "en"),
    ]
    assert series[0]["step"] == [0, 60] and series[0]["bits_per_character"] == [4.0, 3.5]
    assert series[0]["seen"] == [0.0, 60 * 1024] and series[0]["elapsed"] == [0.0, 30.0]


def test_a_loss_that_was_not_finite_is_no_number_of_the_page(rows):
    rows[-1]["loss"] = "nan"
    rows[5]["loss"] = "inf"
    assert describe_evaluations(rows)[-1]["loss"][-1] is None
    assert all(math.isfinite(value) for value in describe_values(rows).values())


def test_events_keep_their_details_and_checkpoints_are_left_out():
    rows = [
        {"kind": "event", "step": 5, "event": "checkpoint"},
        {"kind": "event", "step": 5, "event": "resumed", "checkpoint": "step-00000005"},
    ]
    assert describe_events(rows) == [{"step": 5, "event": "resumed", "details": {"checkpoint": "step-00000005"}}]


@pytest.mark.parametrize(
    ("steps", "shown"), [([], []), ([0], [0]), ([0, 5], [0, 5]), (range(0, 100, 10), [0, 30, 60, 90])]
)
def test_replies_are_shown_of_the_start_the_end_and_evenly_between(steps, shown):
    rows = [row for step in steps for row in replies(step)]
    found = describe_replies([*evaluations(0, 4.0), *rows])
    assert [each["step"] for each in found] == shown
    assert all(each["generations"] == replies(each["step"]) for each in found)
