"""How much a setting explains, against a plain analysis of variance."""

import math
import random

import pytest

from cqlora.report.importance import explained_share, gather_levels, rank_importances


def test_a_setting_that_decides_explains_all_and_one_without_effect_nothing():
    levels = [number % 3 for number in range(30)]
    assert explained_share(levels, [float(level) for level in levels]) == pytest.approx(1.0)
    noise = random.Random(2)
    assert explained_share(levels, [noise.random() for _ in levels]) < 0.1
    assert explained_share(levels, [1.0] * 30) == 0.0 and explained_share([1] * 30, list(map(float, range(30)))) == 0.0


def test_the_share_is_omega_squared_as_written_in_textbooks():
    # (SS_between - (k - 1) MS_within) / (SS_total + MS_within), by hand for three groups of two.
    levels, numbers = ["a", "a", "b", "b", "c", "c"], [1.0, 3.0, 4.0, 6.0, 8.0, 8.0]
    between = 2 * ((2 - 5) ** 2 + (5 - 5) ** 2 + (8 - 5) ** 2)
    within = (1 + 1 + 1 + 1 + 0 + 0) / 3
    total = between + 4
    assert explained_share(levels, numbers) == pytest.approx((between - 2 * within) / (total + within))


def test_a_level_for_every_run_explains_nothing_that_can_be_told():
    assert math.isnan(explained_share(list("abcdef"), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))


def test_many_numbers_are_gathered_into_thirds_and_few_or_words_are_not():
    assert gather_levels([float(number) for number in range(9)]) == ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    assert gather_levels([4, 8, 4, 8, 4, 8]) == ["4", "8"] * 3
    assert gather_levels(["a", 1, None]) == ['"a"', "1", "null"]


def test_below_ten_runs_there_are_no_shares():
    runs = [{"values": {"eval/loss": float(number)}, "differing": {"lora.rank": number % 2}} for number in range(10)]
    assert rank_importances(runs[:9])["eval/loss"] == {"runs": 9, "shares": {}}
    assert set(rank_importances(runs)["eval/loss"]["shares"]) == {"lora.rank"}


def test_what_all_runs_have_alike_is_no_candidate():
    runs = [
        {"values": {"loss": float(number % 2)}, "differing": {"rank": number % 2, "steps": 12}} for number in range(12)
    ]
    assert rank_importances(runs)["loss"]["shares"] == {"rank": pytest.approx(1.0)}
