"""The learning-rate finder against plain runs and a curve of known shape; nothing of it is kept."""

import json
from itertools import pairwise

import pytest

from cqlora.errors import TrainingError
from cqlora.system.metrics import read_metrics
from cqlora.train.learning_rate import HIGHEST, LOWEST, STEPS, Point, choose, rates
from tests.conftest import run_verb
from tests.runs import SMALL, finish_run, finish_workers, losses, typed_run

RUN = ("stage=pretrain", "model.quantization=none", "lora.dropout=0", "stage.warmup_steps=0")
FIND = "stage.find_learning_rate=true"
DDP = ("hardware.processes_per_node=2", "hardware.strategy=ddp")


def found_in(folder):
    return json.loads((folder / "learning_rate.json").read_text())


def test_rates_rise_by_one_factor_from_the_lowest_to_the_highest():
    swept = rates()
    assert len(swept) == STEPS and swept[0] == pytest.approx(LOWEST) and swept[-1] == pytest.approx(HIGHEST)
    factors = [after / before for before, after in pairwise(swept)]
    assert factors == pytest.approx([factors[0]] * len(factors))


def test_the_choice_is_a_tenth_of_the_rate_at_which_the_smoothed_loss_is_lowest():
    gains = [0.0, 0.1, 0.5, 0.9, 0.3, -2.0]
    points = [Point(10.0**-step, 3.0, 0.0, gain) for step, gain in enumerate(gains)]
    assert choose(points) == pytest.approx(1e-4)


@pytest.mark.parametrize("gains", [[], [0.0, -0.1, -0.7]], ids=["none was finite", "none is lower"])
def test_a_curve_that_never_falls_gives_no_choice(gains):
    with pytest.raises(TrainingError, match="lowered the loss"):
        choose([Point(1e-6, 3.0, gain, gain) for gain in gains])


def test_it_begins_as_a_run_at_its_lowest_rate_and_leaves_nothing_but_its_curve(workspace, tmp_path):
    find, plain = tmp_path / "find", tmp_path / "plain"
    assert finish_run(typed_run(workspace, *RUN, FIND), find) == 0
    # AdamW's first step has the rate's size: the second loss of both is that of the same parameters.
    constant = ("stage.schedule=constant", f"stage.learning_rate={LOWEST}", "stage.max_steps=2")
    assert finish_run(typed_run(workspace, *RUN, *constant), plain) == 0
    found = found_in(find)
    taken = [loss for _, loss in losses(plain)]
    assert [point["loss"] for point in found["points"][:2]] == pytest.approx(taken, rel=1e-6)
    assert found["points"][0]["gain"] == pytest.approx(0, abs=1e-6)
    best = max(found["points"], key=lambda point: point["smoothed_gain"])
    assert found["learning_rate"] == pytest.approx(best["learning_rate"] / 10, rel=0.05)
    assert best["smoothed_gain"] > 0.01 and best["learning_rate"] > 100 * LOWEST
    assert not (find / "adapter").exists() and not (find / "checkpoints").exists()
    assert not [row for row in read_metrics(find) if row["kind"] != "event"]

    # The same folder then trains with what was found.
    then = ("stage.max_steps=1", f"stage.learning_rate={found['learning_rate']}")
    assert finish_run(typed_run(workspace, *RUN, *then), find) == 0
    assert (find / "adapter").is_dir()
    # And is not swept once there is a checkpoint.
    assert finish_run(typed_run(workspace, *RUN, *then, FIND), find) == 1
    assert "stage.find_learning_rate was False and is True" in (find / "stderr.txt").read_text()


def test_the_curve_and_the_choice_stand_in_the_terminal(workspace):
    told = run_verb(workspace, "run", *SMALL, "stage=pretrain", FIND, "hydra.run.dir=found").stdout
    chosen = found_in(workspace / "found")["learning_rate"]
    assert f"stage.learning_rate={chosen:g}  a tenth of the rate at which the smoothed loss is lowest" in told
    assert told.count("← lowest") == 1 and "report" not in told
    assert {file.name for file in (workspace / "found").iterdir()} >= {"learning_rate.json", "run.yaml"}


def test_two_workers_find_what_one_does(workspace, tmp_path):
    assert finish_run(typed_run(workspace, *RUN, FIND), tmp_path / "one") == 0
    assert finish_workers(typed_run(workspace, *RUN, FIND, *DDP), tmp_path / "two") == [0, 0]
    one, two = found_in(tmp_path / "one"), found_in(tmp_path / "two")
    assert one["learning_rate"] == two["learning_rate"]
    assert [point["loss"] for point in two["points"][:10]] == pytest.approx(
        [point["loss"] for point in one["points"][:10]], rel=1e-4
    )
