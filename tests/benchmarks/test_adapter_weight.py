"""The Pareto front of Chinese against English."""

from benchmarks.adapter_weight import find_front


def test_on_the_front_is_what_no_other_weight_beats_in_both_languages():
    scores = {0.0: (4.0, 1.0), 0.5: (3.6, 1.0), 0.7: (3.5, 1.1), 0.9: (3.5, 1.2), 1.0: (3.4, 1.3)}
    assert find_front(scores) == [0.5, 0.7, 1.0]


def test_equal_scores_are_both_on_the_front():
    assert find_front({0.5: (3.0, 1.0), 1.0: (3.0, 1.0)}) == [0.5, 1.0]
