"""What a log that is no terminal is told, by a clock that the test moves."""

import pytest

from cqlora.system.progress import Lines, Pace, duration


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_begins_is_reported_at_once_and_then_every_minute_for_how_long_it_goes_on(clock):
    lines_seen: list[str] = []
    lines = Lines(lines_seen.append, clock)
    lines.begin("loading the base")
    for _ in range(150):
        clock.now += 1
        lines.look()
    assert lines_seen == ["loading the base", "loading the base (1 min so far)", "loading the base (2 min so far)"]


def test_quick_steps_give_a_line_a_minute_which_is_the_newest(clock):
    lines_seen: list[str] = []
    lines = Lines(lines_seen.append, clock)
    for step in range(1, 601):
        clock.now += 0.5
        lines.update(f"step {step}", at_once=step in (1, 600))
    assert lines_seen == ["step 1", "step 121", "step 241", "step 361", "step 481", "step 600"]


def test_a_step_of_minutes_is_reported_when_it_ends_and_while_it_goes_on(clock):
    lines_seen: list[str] = []
    lines = Lines(lines_seen.append, clock, nothing_new="next step: {} so far")
    lines.update("step 1", at_once=True)
    for second in range(1, 301):
        clock.now += 1
        if second == 120:
            lines.update("step 2")
        lines.look()
    assert lines_seen == [
        "step 1",
        "step 1 (next step: 1 min so far)",
        "step 2",
        "step 2 (next step: 1 min so far)",
        "step 2 (next step: 2 min so far)",
        "step 2 (next step: 3 min so far)",
    ]


def test_nothing_is_reported_of_a_beginning_that_nobody_has_named(clock):
    lines = Lines(lambda line: pytest.fail(line), clock)
    clock.now += 1000
    lines.look()


def test_time_left_counts_whatever_lies_between_steps(clock):
    pace = Pace(total=12, step=2, clock=clock)
    clock.now += 40
    assert pace.seconds_left(6) == pytest.approx(60.0)
    assert pace.seconds_left(12) == 0.0


def test_durations_read_as_people_say_them():
    assert [duration(s) for s in (0.4, 59.4, 61, 3570, 3600, 11130)] == [
        "0 s", "59 s", "1 min", "1 h 00 min", "1 h 00 min", "3 h 06 min",
    ]  # fmt: skip
