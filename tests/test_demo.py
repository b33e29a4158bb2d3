"""The demo's arithmetic: what a machine is asked for follows from what it was measured to do."""

import json

import pytest

from cqlora.data.sources import SAMPLE_DIR
from tests.runs import typed_run
from tests.test_scripts import load_script

demo = load_script("demo")


@pytest.mark.parametrize("gigaflops", [1, 10, 50, 135, 250, 1000])
def test_a_step_and_an_evaluation_stay_short_unless_they_are_at_their_least(gigaflops):
    """Half of the products' speed, 6 FLOP a weight and token in a step and 2 in an evaluation."""
    scale = demo.choose_scale(gigaflops * 1e9)
    tokens_per_second = 0.5 * gigaflops * 1e9 / 135e6
    assert scale.tokens == 128 or scale.tokens / (tokens_per_second / 6) <= 10
    assert scale.characters == 300 or scale.characters * 2.5 / (tokens_per_second / 2) <= 30
    assert scale.tokens in (128, 256, 512, 1024) and 300 <= scale.characters <= 6000


def test_a_faster_machine_is_asked_for_no_less():
    scales = [demo.choose_scale(2.0**power) for power in range(25, 45)]
    assert scales == sorted(scales, key=lambda scale: (scale.tokens, scale.characters))


def test_steps_fill_what_is_left_and_are_never_none():
    assert demo.choose_steps(100.0, 3.0) == 33
    assert demo.choose_steps(-50.0, 3.0) == demo.FEWEST_STEPS
    assert demo.choose_steps(1e9, 0.1) == demo.MOST_STEPS


@pytest.mark.parametrize("characters", [1, 1000, 10**6])
def test_held_out_text_is_whole_documents_up_to_the_limit_and_training_text_all(characters, tmp_path):
    overrides = demo.hold_out(tmp_path, characters)
    for name, limit in (("sample_zh", characters), ("sample_en", 2 * characters)):
        assert f"data.sources.{name}.path={tmp_path / name}" in overrides
        assert (tmp_path / name / "train.jsonl").read_bytes() == (SAMPLE_DIR / name / "train.jsonl").read_bytes()
        every = (SAMPLE_DIR / name / "val.jsonl").read_text(encoding="utf-8").splitlines()
        taken = (tmp_path / name / "val.jsonl").read_text(encoding="utf-8").splitlines()
        assert taken == every[: len(taken)] and taken
        lengths = [len(json.loads(line)["text"]) for line in taken]
        assert sum(lengths[:-1]) < limit and (sum(lengths) >= limit or taken == every)


@pytest.mark.parametrize("tokens", [128, 512, 1024])
def test_what_it_overrides_composes(tokens, workspace, tmp_path):
    overrides = [*demo.hold_out(tmp_path, 1000), *demo.Scale(1000, tokens).overrides]
    config = typed_run(workspace, "stage=pretrain", *overrides)
    assert config.stage.sequence_length * config.stage.global_batch_size == tokens
