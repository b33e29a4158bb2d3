"""What `wandb agent` calls for each file of scripts/wandb: built by W&B's own agent, composed as it is called."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from cqlora.launch.sweeps import claim_agent_folder
from tests.conftest import ROOT, run_verb
from tests.runs import SMALL

FILES = sorted((ROOT / "scripts" / "wandb").glob("sweep_*.yaml"))


def read_sweep(file: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def points(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of listed values; of a range its lower end."""
    lists = [
        [(key, value) for value in given.get("values", [given.get("value", given.get("min"))])]
        for key, given in sweep["parameters"].items()
    ]
    return [dict(point) for point in itertools.product(*lists)]


def called(sweep: dict[str, Any], point: dict[str, Any]) -> list[str]:
    """The overrides that the agent puts behind the command's module."""
    given = create_sweep_command_args({"args": {key: {"value": value} for key, value in point.items()}})
    command: list[str] = []
    for word in sweep["command"]:
        command += given["args_no_hyphens"] if word == "${args_no_hyphens}" else [word]
    assert command[:4] == ["${env}", "python", "-m", sweep["program"]]
    return command[4:]


CALLS = {
    f"{file.stem}: {' '.join(called(read_sweep(file), point))}": called(read_sweep(file), point)
    for file in FILES
    for point in points(read_sweep(file))[: None if file.stem == "sweep_grid" else 1]
}


def test_there_is_a_file_of_each_kind_and_the_grids_four_points():
    assert [file.stem for file in FILES] == ["sweep_bayes", "sweep_grid", "sweep_hyperband"]
    assert sum(name.startswith("sweep_grid") for name in CALLS) == 4


@pytest.mark.parametrize("overrides", CALLS.values(), ids=list(CALLS))
def test_what_the_agent_calls_composes(overrides, tmp_path):
    composed = yaml.safe_load(run_verb(tmp_path, "run", *overrides, "--cfg", "job", WANDB_SWEEP_ID="abc").stdout)
    rank = next(word.partition("=")[2] for word in overrides if word.startswith("lora.rank="))
    assert composed["lora"]["rank"] == int(rank)
    assert not (tmp_path / "multirun").exists()


def test_runs_of_one_agent_sweep_write_one_record(workspace, tmp_path):
    paths = (f"model.path={workspace}/models/tiny", f"data.cache_dir={workspace}/cache")
    for rank in (2, 4):
        run = (*SMALL, *paths, "stage=sft", "stage.max_steps=1", f"lora.rank={rank}")
        run = tuple(word for word in run if word != "lora.rank=4" or rank == 4)
        run_verb(tmp_path, "run", *dict.fromkeys(run), WANDB_SWEEP_ID="team/abc")
    sweep = tmp_path / "multirun" / "wandb-team_abc"
    lines = [json.loads(line) for line in (sweep / "trials.jsonl").read_text().splitlines()]
    assert [(line["number"], line["state"]) for line in lines] == [
        (0, "running"), (0, "finished"), (1, "running"), (1, "finished"),
    ]  # fmt: skip
    assert [lines[1]["overrides"]["lora.rank"], lines[3]["overrides"]["lora.rank"]] == [2, 4]
    assert (sweep / "1" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "outputs").exists()


def test_each_run_of_an_agent_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [claim_agent_folder("a").name, claim_agent_folder("a").name] == ["0", "1"]


def test_the_example_workspace_is_one_that_wandbs_library_accepts():
    workspace = pytest.importorskip("wandb_workspaces.workspaces", reason="needs the extra `workspace`")
    import importlib.util

    spec = importlib.util.spec_from_file_location("workspace", ROOT / "scripts" / "wandb" / "workspace.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    built = module.build("team", "cqlora")
    assert isinstance(built, workspace.Workspace)
    assert len(built.sections) == 2
