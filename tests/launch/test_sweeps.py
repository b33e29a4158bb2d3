"""Sweeps as a user starts them: run, failed, killed, gone on with; each job trains in processes of its own."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cqlora.config.composition import leave_to_jobs
from cqlora.errors import ConfigError
from cqlora.launch.sweeps import check_same_sweep, expand_resume, hold_sweep, to_values
from cqlora.sweep.trials import read_trials, refuse_trial
from tests.conftest import run_python, run_verb
from tests.runs import SMALL, losses

RUN = (*SMALL, "stage=sft", "stage.max_steps=3", "stage.checkpoint_every_steps=1")
GRID = ("lora.rank=2,4,8", "seed=1,2", "--multirun")


def command(workspace: Path, *overrides: str) -> list[str]:
    paths = (f"model.path={workspace}/models/tiny", f"data.cache_dir={workspace}/cache")
    varied = {each.partition("=")[0] for each in overrides}
    return [*(each for each in RUN if each.partition("=")[0] not in varied), *paths, *overrides]


def table(told: str) -> list[str]:
    """What a sweep prints at its end, without the names of folders."""
    return [line for line in told.splitlines() if line and not line.startswith("sweep ")]


START_AND_KILL = """
import subprocess, sys, time
from pathlib import Path
from cqlora.system.metrics import read_metrics
job, *arguments = sys.argv[1:]
sweep = subprocess.Popen([sys.executable, "-m", "cqlora.run", *arguments])
while sweep.poll() is None and not any(row["kind"] == "train" for row in read_metrics(Path(job))):
    time.sleep(0.02)
sweep.kill()
sys.exit(sweep.wait() != -9)
"""
"""kill -9 a sweep when a job has trained a step."""


def test_killed_in_the_middle_a_sweep_goes_on_and_ends_in_the_table_of_one_that_was_not(workspace, tmp_path):
    whole = run_verb(tmp_path, "run", *command(workspace, *GRID, "hydra.sweep.dir=whole")).stdout
    run_python(tmp_path, "-c", START_AND_KILL, "killed/3", *command(workspace, *GRID, "hydra.sweep.dir=killed"))
    assert [trial.state for trial in read_trials(tmp_path / "killed")] == ["finished"] * 3 + ["running"]
    gone_on = run_verb(tmp_path, "run", "sweep.resume=killed").stdout
    assert table(gone_on) == table(whole) and len(table(whole)) == 4
    started = [json.loads(line)["number"] for line in (tmp_path / "killed" / "trials.jsonl").read_text().splitlines()]
    assert started == [0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5]
    assert table(run_verb(tmp_path, "run", "sweep.resume=killed").stdout) == table(whole)


def test_killed_in_the_middle_a_search_goes_on_and_ends_in_the_table_of_one_that_was_not(workspace, tmp_path):
    pytest.importorskip("optuna", reason="needs the extra `search`")
    search = ("hydra/sweeper=optuna", "sweep.trials=8", "sweep.startup_trials=3", "lora.rank=2,4,8",
              "stage.learning_rate=tag(log,interval(1e-4,1e-2))", "--multirun")  # fmt: skip
    whole = run_verb(tmp_path, "run", *command(workspace, *search, "hydra.sweep.dir=whole")).stdout
    run_python(tmp_path, "-c", START_AND_KILL, "killed/4", *command(workspace, *search, "hydra.sweep.dir=killed"))
    assert read_trials(tmp_path / "killed")[-1].state == "running"
    gone_on = run_verb(tmp_path, "run", "sweep.resume=killed").stdout
    assert table(gone_on) == table(whole) and len(table(whole)) == 9
    proposed = [[trial.overrides for trial in read_trials(tmp_path / name)] for name in ("whole", "killed")]
    assert proposed[0] == proposed[1] and len(proposed[0]) == 8


def test_a_training_job_worse_than_the_median_is_pruned_and_leaves_a_checkpoint(workspace, tmp_path):
    """This seed proposes the rates 1e-2, 1e-5, 1e-2, 1e-5: the last has nothing to win."""
    pytest.importorskip("optuna", reason="needs the extra `search`")
    search = ("hydra/sweeper=optuna", "sweep.trials=4", "sweep.startup_trials=4", "sweep.seed=2",
              "sweep.pruner=median", "sweep.prune_after_trials=2", "stage.learning_rate=1e-5,1e-2")  # fmt: skip
    length = ("stage.max_steps=150", "stage.checkpoint_every_steps=150", "stage.eval_every_steps=25")
    run_verb(tmp_path, "run", *command(workspace, *search, *length, "hydra.sweep.dir=pruned", "--multirun"))
    trials = read_trials(tmp_path / "pruned")
    assert [trial.overrides["stage.learning_rate"] for trial in trials] == [1e-2, 1e-5, 1e-2, 1e-5]
    assert [trial.state for trial in trials] == ["finished", "finished", "finished", "pruned"]
    assert "worse than the median" in (trials[3].error or "")
    (checkpoint,) = (tmp_path / "pruned" / "3" / "checkpoints").glob("step-*")
    assert 0 < int(checkpoint.name.removeprefix("step-")) == losses(tmp_path / "pruned" / "3")[-1][0] < 150


def test_a_job_that_fails_is_recorded_with_its_reason_and_the_others_complete(workspace, tmp_path):
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept" / "2").touch()
    arguments = command(workspace, "lora.rank=2,-1,4,8", "hydra.sweep.dir=swept", "--multirun")
    told = run_verb(tmp_path, "run", *arguments, expect=1, DB_PASS="planted-in-the-environment")
    trials = read_trials(tmp_path / "swept")
    assert [trial.state for trial in trials] == ["finished", "failed", "failed", "finished"]
    assert trials[2].error is not None and "2 could not be read or written: something else is there" in trials[2].error
    assert "error: job 2 (" in told.stderr and "something else is there already" in told.stderr
    assert trials[1].error is not None and "lora.rank=-1 must be above 0" in trials[1].error
    assert "error: job 1 (" in told.stderr and "lora.rank=-1 must be above 0" in told.stderr
    files = [file for file in (tmp_path / "swept").rglob("*") if file.is_file()]
    assert files and not [file for file in files if b"planted-in" in file.read_bytes()]


def test_a_search_trains_what_is_proposed_and_leaves_out_what_does_not_fit(workspace, tmp_path):
    pytest.importorskip("optuna", reason="needs the extra `search`")
    search = ("hydra/sweeper=optuna", "sweep.trials=2", "hardware.host_memory_gib=16,0.01", "hydra.sweep.dir=found")
    told = run_verb(tmp_path, "run", *command(workspace, *search, "--multirun"), expect=0).stdout
    assert "left out: hardware.host_memory_gib=0.01: the run needs" in told
    trials = read_trials(tmp_path / "found")
    assert sum(trial.state == "finished" for trial in trials) == 2
    assert {trial.overrides["hardware.host_memory_gib"] for trial in trials if trial.state == "finished"} == {16}


def test_what_a_swept_group_has_below_it_is_left_to_each_job():
    assert leave_to_jobs(["stage=pretrain,sft", "stage.system_prompt=x", "lora.rank=4,8", "seed=1,2"]) == [
        "stage=pretrain", "lora.rank=4,8", "seed=1,2",
    ]  # fmt: skip


def test_a_key_that_one_jobs_group_lacks_names_the_job(tmp_path):
    told = run_verb(tmp_path, "run", "stage=pretrain,sft", "stage.system_prompt=x", "--multirun", expect=2).stderr
    job = "job 0 (stage=pretrain stage.system_prompt=x)"
    assert told.startswith(f"error: {job}: stage.system_prompt is not a key of this choice of stage")
    assert not (tmp_path / "multirun").exists()


def test_going_on_takes_the_sweeps_own_overrides_and_few_others(tmp_path):
    recorded = {"hydra": {"overrides": {"task": ["stage=sft", "lora.rank=2,4", "sweep.trials=8"],
                                        "hydra": ["hydra.mode=MULTIRUN", "hydra/sweeper=optuna"]}}}  # fmt: skip
    OmegaConf.save(OmegaConf.create(recorded), tmp_path / "multirun.yaml")
    resume = f"sweep.resume={tmp_path}"
    own = ["stage=sft", "lora.rank=2,4", "hydra/sweeper=optuna"]
    ends = [f"hydra.sweep.dir='{tmp_path}'", "--multirun"]
    assert expand_resume([resume]) == [*own[:2], "sweep.trials=8", own[2], *ends]
    more = expand_resume([resume, "sweep.trials=9", "stage=sft"])
    assert more == ["lora.rank=2,4", own[2], "sweep.trials=9", "stage=sft", *ends]
    assert expand_resume(["stage=sft"]) == ["stage=sft"]
    with pytest.raises(ConfigError, match=r"leave out lora\.rank="):
        expand_resume([resume, "lora.rank=64"])
    with pytest.raises(ConfigError, match="give the folder of a sweep"):
        expand_resume([f"sweep.resume={tmp_path}/nowhere"])


def test_another_sweep_in_the_folder_is_refused(tmp_path):
    refuse_trial(tmp_path, 0, to_values(["lora.rank=2"]), "too large.")
    check_same_sweep(tmp_path, [(0, ["lora.rank=2"])])
    with pytest.raises(ConfigError, match=r"holds another sweep, whose job 0 is lora\.rank=2"):
        check_same_sweep(tmp_path, [(0, ["lora.rank=4"])])


def test_overrides_are_recorded_as_numbers_where_they_are_some():
    typed = [
        "lora.rank=4",
        "stage.learning_rate=1e-4",
        "data.root='a b'",
        "hardware.allow_misfit=true",
        "x=null",
        "t=[a,b]",
        "sweep.trials=8",
    ]
    assert to_values(typed) == {
        "lora.rank": 4, "stage.learning_rate": 1e-4, "data.root": "a b", "hardware.allow_misfit": True, "x": None,
        "t": "[a,b]",
    }  # fmt: skip


@pytest.mark.parametrize(
    "overrides, told",
    [
        (("lora.rank=interval(2,4)",), "is a range to search; add hydra/sweeper=optuna"),
        (("sweep.trials=3", "seed=1,2"), "has no effect without hydra/sweeper=optuna"),
        (("hydra/sweeper=optuna",), "nothing is searched"),
        (("hydra/sweeper=optuna", "lora.rank=2,4", "sweep.at_once=2"), "where jobs run one after another"),
        (("hydra/sweeper=optuna", "lora.rank=2,4", "sweep.pruner=median"), "add stage.eval_every_steps"),
        (("hydra.sweep.subdir=x", "seed=1,2"), "hydra.sweep.subdir has no use here"),
        (("sweep.objectives=[eval/loss:least]",), "has the goal least; use minimize or maximize"),
        (("seed=range(1,9,step=0)",), "has no values, or too many"),
        (("seed=range(1,inf)",), "has no end"),
        (("sweep.objectives=[eval/loss,eval/loss:maximize]", "seed=1,2"), "names eval/loss twice"),
        (("sweep.objectives=[eval/sample_dialog/zh/los]", "seed=1,2"), "did you mean eval/sample_dialog/zh/loss?"),
        (("sweep.objectives=[eval/wiki_zh/zh/loss]", "seed=1,2"), "which no run here measures"),
    ],
)
def test_what_would_have_no_effect_is_refused(overrides, told, tmp_path):
    assert told in run_verb(tmp_path, "run", "stage=sft", *overrides, "--multirun", expect=2).stderr
    assert not any(tmp_path.iterdir())


def test_a_grid_that_runs_already_is_refused_at_the_door_and_goes_on_unharmed(workspace, tmp_path):
    arguments = command(workspace, "seed=1,2", "hydra.sweep.dir=swept", "--multirun")
    with hold_sweep(tmp_path / "swept"):
        (tmp_path / "swept" / "multirun.yaml").write_text("the first one's")
        before = sorted((tmp_path / "swept").iterdir())
        second = run_verb(tmp_path, "run", *arguments, expect=2)
        assert second.stderr == (
            "error: another process runs the sweep in swept; wait for it, or give another folder with "
            "hydra.sweep.dir=FOLDER.\n"
        )
        assert sorted((tmp_path / "swept").iterdir()) == before
        assert (tmp_path / "swept" / "multirun.yaml").read_text() == "the first one's"
