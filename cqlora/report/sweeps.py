"""What the folder of a sweep, or several runs side by side, say of them."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cqlora.errors import ConfigError
from cqlora.report.importance import rank_importances
from cqlora.report.runs import describe_run, is_run

TRIALS_FILE = "trials.jsonl"
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
    trials = read_trials(folder / TRIALS_FILE) or [
        {"number": int(job.name), "folder": str(job)} for job in list_jobs(folder)
    ]
    return compare([describe_trial(folder, trial) for trial in trials]) | {"name": folder.name, "folder": str(folder)}


def describe_runs(folders: Iterable[Path]) -> dict[str, Any]:
    """Runs side by side that no sweep has made."""
    runs = [small(describe_run(folder, MOST_POINTS)) for folder in folders]
    return compare(runs) | {"name": f"{len(runs)} runs", "folder": ""}


def read_trials(file: Path) -> list[dict[str, Any]]:
    """The trials of a sweep by their number; of several lines of one trial the last counts, damaged ones do not."""
    trials: dict[int, dict[str, Any]] = {}
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        try:
            trial = json.loads(line, parse_constant=lambda name: None, parse_float=finite)
        except (ValueError, RecursionError):
            continue
        if isinstance(trial, dict) and isinstance(trial.get("number"), int):
            trials[trial["number"]] = trial
    return [trials[number] for number in sorted(trials)]


def finite(text: str) -> float | None:
    """A number of a record; None for one that no page can hold."""
    number = float(text)
    return number if math.isfinite(number) else None


def describe_trial(sweep: Path, trial: dict[str, Any]) -> dict[str, Any]:
    """One trial: what its folder says, and over it what the sweep has recorded."""
    number = trial["number"]
    named = Path(str(trial.get("folder") or number))
    places = (named, sweep / named.name, sweep / str(number))
    folder = next((place for place in places if is_run(place)), None)
    run = small(describe_run(folder, MOST_POINTS)) if folder else {"values": {}, "state": "missing", "curves": None}
    overrides, values = trial.get("overrides"), trial.get("values")
    run["number"], run["name"] = number, str(number)
    run["state"] = str(trial.get("state") or run["state"])
    run["error"] = trial.get("error") and str(trial["error"])
    run["overrides"] = overrides if isinstance(overrides, dict) else {}
    run["values"] |= {
        key: value for key, value in (values if isinstance(values, dict) else {}).items() if is_number(value)
    }
    if folder and (folder / "report.html").is_file():
        run["report"] = f"{folder.relative_to(sweep)}/report.html" if folder.is_relative_to(sweep) else ""
    return run


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
    described = [run for run in runs if run["settings" if "settings" in run else "overrides"]]
    keys = {key: None for run in described for key in run.get("settings", {})}
    differing = [
        key for key in keys if len({to_text(run["settings"].get(key)) for run in described if run.get("settings")}) > 1
    ]
    for run in runs:
        settings = run.pop("settings", {})
        run["differing"] = {key: settings[key] for key in differing if key in settings} | run.get("overrides", {})
        run.setdefault("overrides", {})
    return {"kind": "sweep", "runs": runs, "differing": differing, "importances": rank_importances(runs)}


def is_number(value: object) -> bool:
    """Whether a measure has a value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_text(value: object) -> str:
    """A value to compare by."""
    return json.dumps(value, sort_keys=True, default=str)
