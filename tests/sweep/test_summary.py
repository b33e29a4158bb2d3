"""The table at a sweep's end, compared with numbers computed by hand."""

from cqlora.config.choices import Goal
from cqlora.sweep.summary import find_front, gather_settings, render_summary
from cqlora.sweep.trials import State, Trial

LOSS = {"eval/loss": Goal.minimize}
TWO = {"zh": Goal.minimize, "en": Goal.maximize}


def trial(number: int, state: State = State.finished, **given: object) -> Trial:
    values = {key: value for key, value in given.items() if key in ("zh", "en")}
    values |= {"eval/loss": given["loss"]} if "loss" in given else {}
    overrides = {"stage": "sft", "lora.rank": given.get("rank", 4), "seed": given.get("seed", 1)}
    return Trial(
        number=number,
        folder=str(number),
        overrides=overrides,
        state=state,
        values=values,
        error=None,
        seconds=1,
        time="",
    )


def test_seeds_of_one_setting_are_gathered_into_mean_and_sample_deviation_best_first():
    trials = [trial(0, rank=4, seed=1, loss=3.0), trial(1, rank=4, seed=2, loss=5.0), trial(2, rank=8, loss=2.0)]
    best, other = gather_settings(trials, LOSS)
    assert [best.overrides["lora.rank"], other.overrides["lora.rank"]] == [8, 4]
    # (3 - 4)² + (5 - 4)² over one degree of freedom.
    assert (other.mean("eval/loss"), other.spread("eval/loss")) == (4.0, 2.0**0.5)
    table = render_summary(trials, LOSS).splitlines()
    assert table[0].split() == ["lora.rank", "eval/loss", "(minimize)", "state", "jobs"]
    assert table[1].split() == ["8", "2.0000", "finished", "2"]
    assert table[2].split() == ["4", "4.0000", "±", "1.4142", "finished", "0,1"]


def test_more_is_better_where_the_goal_says_so():
    trials = [trial(0, rank=4, loss=1.0), trial(1, rank=8, loss=2.0)]
    (best, _) = gather_settings(trials, {"eval/loss": Goal.maximize})
    assert best.overrides["lora.rank"] == 8


def test_jobs_without_a_number_come_last_with_their_state():
    trials = [trial(0, State.failed, rank=2), trial(1, rank=4, loss=1.0), trial(2, State.refused, rank=8)]
    lines = render_summary(trials, LOSS).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["4", "2", "8"]
    assert lines[2].split()[1:] == ["-", "failed", "0"]


def test_the_front_has_whom_nobody_beats_in_both_objectives():
    trials = [trial(0, rank=1, zh=1.0, en=1.0), trial(1, rank=2, zh=2.0, en=2.0), trial(2, rank=3, zh=2.0, en=1.5)]
    settings = gather_settings(trials, TWO)
    assert [setting.overrides["lora.rank"] for setting in find_front(settings, TWO)] == [1, 2]
    assert [line.endswith("*") or " * " in line for line in render_summary(trials, TWO).splitlines()[1:4]] == [
        True, True, False,
    ]  # fmt: skip
