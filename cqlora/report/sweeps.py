"""What the folder of a sweep, or several runs side by side, say of them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cqlora.errors import ConfigError
from cqlora.report.importance import rank_importances
from cqlora.report.runs import describe_run, is_run
from cqlora.sweep.trials import TRIALS_FILE, Trial, read_trials

MOST_POINTS = 400
"""Of each curve on a page of many runs; a run's own page has more."""
_SMALL = ("name", "folder", "title", "state", "values", "curves", "evaluations", "events", "planned_gib", "modified",
          "notes")  # fmt: skip
"""What a page of many runs takes of each."""


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds the runs of a sweep."""
    return (folder / TRIALS_FILE).is_file() or any(is_run(each) for each in list_jobs(folder))


def list_jobs(folder: Path) -> list[Path]:
    """The numbered folders of a sweep, in the order of their numbers."""
    if not folder.is_dir():
        return []
    return sorted(
        (each for each in folder.iterdir() if each.is_dir() and each.name.isdigit()), key=lambda f: int(f.name)
    )


def describe_sweep(folder: Path) -> dict[str, Any]:
    """All that a page shows of a sweep, by its trials' record, or by its folders where it has none."""
    runs = [describe_trial(folder, trial) for trial in read_trials(folder)]
    runs = runs or [describe_job(job, int(job.name)) for job in list_jobs(folder)]
    return compare(runs) | {"name": folder.name, "folder": str(folder)}


def describe_runs(folders: Iterable[Path]) -> dict[str, Any]:
    """Runs side by side that no sweep has made."""
    runs = [small(describe_run(folder, MOST_POINTS)) for folder in folders]
    return compare(runs) | {"name": f"{len(runs)} runs", "folder": ""}


def describe_trial(sweep: Path, trial: Trial) -> dict[str, Any]:
    """One trial: what its folder says, and over it what the sweep has recorded."""
    places = (sweep / trial.folder, sweep / str(trial.number))
    folder = next((place for place in places if is_run(place)), None)
    run = describe_job(folder, trial.number)
    run |= {"state": trial.state.value, "error": trial.error, "overrides": without_infinities(trial.overrides)}
    run["values"] |= {key: value for key, value in without_infinities(trial.values).items() if value is not None}
    if folder and (folder / "report.html").is_file() and folder.is_relative_to(sweep):
        run["report"] = f"{folder.relative_to(sweep)}/report.html"
    return run


def describe_job(folder: Path | None, number: int) -> dict[str, Any]:
    """What the folder of a job says; little where it has not begun."""
    run = small(describe_run(folder, MOST_POINTS)) if folder else {"values": {}, "state": "missing", "curves": None}
    return run | {"number": number, "name": str(number)}


def without_infinities(values: dict[str, Any]) -> dict[str, Any]:
    """Values as a page can hold them: what is no finite number is None."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str), parse_constant=lambda name: None)
    return plain


def small(run: dict[str, Any]) -> dict[str, Any]:
    """What a page of many runs takes of one; its settings by key."""
    kept = {key: run[key] for key in _SMALL if key in run}
    return kept | {"settings": {setting["key"]: setting["value"] for setting in run.get("settings", [])}}


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs with the settings in which they differ, and how much of each measure each of those explains.

    Raises:
        ConfigError: there are none.
    """
    if not runs:
        raise ConfigError("no run of the sweep has begun; start it, and write the report then.")
    described = [run["settings"] for run in runs if run.get("settings")]
    keys = {key: None for settings in described for key in settings}
    # A source's own keys follow from data=, and a run's name from its overrides.
    chosen = [key for key in keys if not key.startswith(("data.sources.", "tracking."))]
    differing = [key for key in chosen if len({to_text(settings.get(key)) for settings in described}) > 1]
    for run in runs:
        settings = run.pop("settings", {})
        run["differing"] = {key: settings[key] for key in differing if key in settings} | run.get("overrides", {})
        run.setdefault("overrides", {})
    return {"kind": "sweep", "runs": runs, "differing": differing, "importances": rank_importances(runs)}


def to_text(value: object) -> str:
    """A value to compare by."""
    return json.dumps(value, sort_keys=True, default=str)
