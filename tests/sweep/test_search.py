"""A search shared and killed: no trial lost, none doubled, the same values proposed; its jobs are a formula here."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cqlora.config.choices import Pruner
from cqlora.config.sweeps import SweepConfig
from cqlora.errors import ConfigError
from cqlora.sweep.search import STUDY_FILE, Follower, Search, find_trial, follow_trial, load_study, read_space
from cqlora.sweep.trials import hold_trial, read_trials, record_trial
from tests.sweep.test_trials import evaluate

optuna = pytest.importorskip("optuna", reason="needs the extra `search`")

SPACE = ("stage=sft", "lora.rank=choice(2,4,8)", "stage.learning_rate=tag(log,interval(1e-5,1e-2))")
_context = multiprocessing.get_context("fork")


def parse(*overrides: str):
    return OverridesParser.create().parse_overrides(list(overrides))


def open_search(folder: Path, **settings: object) -> Search:
    search = Search(folder, SweepConfig(**{"startup_trials": 2, **settings}), read_space(parse(*SPACE))[1])
    search.open()
    return search


def run_job(folder: Path, number: int, overrides: list[str]) -> None:
    """A trial whose loss is a formula of what was proposed."""
    values = dict(override.split("=") for override in overrides)
    with record_trial(folder, folder / str(number), values):
        loss = float(values["stage.learning_rate"]) * 100 + 1 / int(values["lora.rank"])
        evaluate(folder / str(number), 0, 9.0, 9.0)
        evaluate(folder / str(number), 4, loss, loss)


def run_search(folder: Path, die_at: int | None = None, **settings: object) -> None:
    """Run trials until there are enough; with `die_at`, kill this process in the middle of that one."""
    search = open_search(folder, **settings)
    while (proposal := search.propose()) is not None:
        if proposal.number == die_at:
            with record_trial(folder, folder / str(die_at), {}):
                os.kill(os.getpid(), signal.SIGKILL)
        run_job(folder, proposal.number, proposal.overrides)
        search.tell(proposal.number)


def in_child(*arguments: object, **settings: object) -> multiprocessing.process.BaseProcess:
    child = _context.Process(target=run_search, args=arguments, kwargs=settings)
    child.start()
    return child


def results(folder: Path) -> list[tuple[int, dict[str, object], list[float] | None]]:
    return [(trial.number, trial.params, trial.values) for trial in load_study(folder / STUDY_FILE).trials]


def test_hydras_syntax_becomes_optunas_distributions():
    fixed, space = read_space(
        parse(
            "stage=sft",
            "a=choice(x,y)",
            "b=interval(0.1,1)",
            "c=tag(log,int(interval(1,64)))",
            "d=range(2,9,step=2)",
            "e=1,2",
        )
    )
    distributions = optuna.distributions
    assert fixed == ["stage=sft"]
    assert space == {
        "a": distributions.CategoricalDistribution(["x", "y"]),
        "b": distributions.FloatDistribution(0.1, 1),
        "c": distributions.IntDistribution(1, 64, log=True),
        "d": distributions.IntDistribution(2, 8, step=2),
        "e": distributions.CategoricalDistribution(["1", "2"]),
    }


@pytest.mark.parametrize(
    "overrides, told",
    [
        (("stage=sft",), "nothing is searched"),
        (("seed=1,2",), "seed is no value to search for"),
        (("a=tag(log,interval(0,1))",), "has a logarithm"),
        (("a=interval(2,1)",), "spans nothing"),
        (("a=interval(1,inf)",), "has no end"),
        (("a=interval(nan,2)",), "has no end"),
        (("a=range(1,inf)",), "has no end"),
        (("a=range(1,9,step=0)",), "has no values, or too many"),
        (("a=range(1,9,step=nan)",), "has no values, or too many"),
        (("a=range(9,1)",), "has no values, or too many"),
        (("a=range(0,1,step=1e-9)",), "has no values, or too many"),
    ],
)
def test_what_cannot_be_searched_is_refused(overrides, told):
    with pytest.raises(ConfigError, match=told):
        read_space(parse(*overrides))


def test_killed_in_a_trial_a_search_retries_it_and_proposes_what_one_never_killed_does(tmp_path):
    run_search(tmp_path / "whole", trials=8)
    child = in_child(tmp_path / "killed", 5, trials=8)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    run_search(tmp_path / "killed", trials=8)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert [trial.state for trial in read_trials(tmp_path / "killed")] == ["finished"] * 8


def test_two_processes_share_a_search_of_twelve_trials_without_a_lost_or_doubled_one(tmp_path):
    children = [in_child(tmp_path, trials=12), in_child(tmp_path, trials=12)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert sum('"state": "running"' in line for line in lines) == 12 and len(lines) == 24
    told = results(tmp_path)
    assert [number for number, _, _ in told] == list(range(12))
    by_number = {trial.number: trial.values["eval/loss"] for trial in read_trials(tmp_path)}
    assert all(values == [by_number[number]] for number, _, values in told)


def test_a_job_that_goes_on_without_who_asked_for_it_is_left_to_itself_and_told_when_it_ends(tmp_path):
    first = open_search(tmp_path, trials=2)
    orphan = first.propose()
    assert orphan is not None
    first.release_all()
    with hold_trial(tmp_path, orphan.number):
        second = open_search(tmp_path, trials=2)
        other = second.propose()
        assert other is not None and other.number == 1
    run_job(tmp_path, orphan.number, orphan.overrides)
    run_job(tmp_path, other.number, other.overrides)
    second.tell(other.number)
    assert second.propose() is None
    assert [trial.state.name for trial in load_study(tmp_path / STUDY_FILE).trials] == ["COMPLETE", "COMPLETE"]


def test_what_does_not_fit_takes_no_trial_away(tmp_path):
    search = open_search(tmp_path, trials=1)
    refused = search.propose()
    assert refused is not None
    search.refuse(refused.number)
    proposal = search.propose()
    assert proposal is not None and proposal.number == 1 and search.propose() is None


def test_several_objectives_are_told_each_with_its_goal(tmp_path):
    objectives = ["eval/wiki/zh/loss", "eval/loss:maximize"]
    run_search(tmp_path, trials=2, objectives=objectives)
    study = load_study(tmp_path / STUDY_FILE)
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert all(len(trial.values) == 2 for trial in study.trials)


def test_another_search_in_the_folder_is_refused(tmp_path):
    open_search(tmp_path)
    with pytest.raises(ConfigError, match="holds another search"):
        open_search(tmp_path, seed=2)


def test_an_evaluation_worse_than_the_median_of_earlier_trials_asks_for_an_end(tmp_path):
    settings = {"trials": 3, "pruner": Pruner.median, "prune_after_trials": 2}
    search = open_search(tmp_path, **settings)
    asked: list[bool] = []
    for number, loss in enumerate((1.0, 2.0, 5.0)):
        proposal = search.propose()
        assert proposal is not None and proposal.number == number
        evaluate(tmp_path / str(number), 0, 9.0, 9.0)
        evaluate(tmp_path / str(number), 2, loss, loss)
        with record_trial(tmp_path, tmp_path / str(number), {}):
            with follow_trial(tmp_path / str(number), search.settings, lambda: asked.append(True)) as follower:
                assert isinstance(follower, Follower)
                follower.join(timeout=2.0 if number < 2 else None)
            assert follower.pruned == (number == 2)
        search.tell(number)
    assert asked == [True]
    assert find_trial(load_study(tmp_path / STUDY_FILE), 2).intermediate_values == {2: 5.0}
