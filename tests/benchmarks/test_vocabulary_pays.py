"""Where two recipes meet, by differences at a few budgets."""

import math

import pytest

from benchmarks.vocabulary_pays import find_budgets, find_crossing


def test_differences_on_a_line_meet_where_the_line_is_zero():
    budgets = [150.0, 450.0, 900.0]
    differences = tuple(2.0 - 0.25 * math.log(budget) for budget in budgets)
    at, low, high = find_crossing(budgets, differences, (1e-6,) * 3)
    assert (
        at == pytest.approx(math.exp(8)) and low == pytest.approx(at, rel=1e-3) and high == pytest.approx(at, rel=1e-3)
    )


def test_larger_errors_widen_the_range_about_the_same_place():
    found = [find_crossing([150.0, 450.0, 900.0], (0.7, 0.5, 0.4), (error,) * 3) for error in (0.001, 0.02)]
    assert found[0][0] == pytest.approx(found[1][0])
    assert found[1][1] < found[0][1] < found[0][0] < found[0][2] < found[1][2]


def test_differences_that_grow_never_end():
    assert find_crossing([150.0, 900.0, 1800.0], (0.1, 0.5, 0.6), (0.001,) * 3) == (math.inf, math.inf, math.inf)


def test_only_budgets_of_both_in_processor_seconds_and_the_first_seed_count():
    def line(recipe: str, budget: str, seed: int = 1, clock: str = "processor") -> dict:
        return {"recipe": recipe, "budget": budget, "seed": seed, "clock": clock}

    lines = [line("new", "900s"), line("new", "150s"), line("old", "900s"), line("old", "150s", seed=2)]
    lines += [
        line("new", "60s", clock="wall"),
        line("old", "60s", clock="wall"),
        line("new", "450s"),
        line("old", "450s"),
    ]
    assert [str(budget) for budget in find_budgets(lines, "new", "old")] == ["450s", "900s"]
