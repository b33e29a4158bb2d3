"""What the folder of one run says of it."""

import json
import math
import re
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

from cqlora.base import read_base
from cqlora.config.run_yaml import LOCK_FILE, RUN_FILE, describe_config, flatten, load_run_yaml
from cqlora.config.schema import SETTLED_KEYS, RunConfig
from cqlora.errors import ConfigError, CqloraError, ModelError
from cqlora.plan.estimate import GIB
from cqlora.plan.memory import plan_memory
from cqlora.plan.workload import Rows
from cqlora.report.changes import GROUPS, describe_settings
from cqlora.report.record import (
    describe_curves,
    describe_evaluations,
    describe_events,
    describe_replies,
    describe_values,
)
from cqlora.system.documents import read_object
from cqlora.system.durable import is_locked
from cqlora.system.metrics import METRICS_FILE, read_metrics

EVALUATION_FILE = "evaluation.json"
_PLAIN_WORD = re.compile(r"(?!(?:true|false|null|nan|inf)$)[a-z_/.][\w/.:-]*", re.ASCII | re.IGNORECASE)
"""Text that needs no quotes in an override."""
MOST_POINTS = 4000
"""Of a curve on the page of one run; a screen has fewer columns."""


def is_run(folder: Path) -> bool:
    """Whether a run has written to a folder."""
    return (folder / RUN_FILE).is_file() or (folder / METRICS_FILE).is_file()


def describe_run(folder: Path, most_points: int = MOST_POINTS) -> dict[str, Any]:
    """All that a page shows of a run, as plain values.

    A file that is damaged, or of another version, takes its own part away and no other: `notes` says which.

    Raises:
        ConfigError: no run has written to the folder.
    """
    if not is_run(folder):
        raise ConfigError(f"{folder} holds no run; give a folder with run.yaml and metrics.jsonl, or a sweep's.")
    rows = read_metrics(folder)
    notes: list[str] = []
    run: dict[str, Any] = {
        "name": folder.name,
        "folder": str(folder),
        "state": describe_state(folder, rows),
        "curves": describe_curves(rows, most_points),
        "evaluations": describe_evaluations(rows),
        "values": describe_values(rows),
        "replies": describe_replies(rows),
        "events": describe_events(rows),
        "modified": last_change(folder),
    }
    config = read_config(folder, notes)
    if config is not None:
        run |= {"title": f"{config.stage.name} · {config.model.name} · {config.data.name}", "stage": config.stage.name}
        run |= {"settings": describe_settings(config), "planned_gib": plan_peak(config)}
        run |= {"mix": read_mix(folder, config, notes), "commands": write_commands(folder, config, run["settings"])}
    run |= {"evaluation": read_evaluation(folder, notes), "notes": notes}
    return run


def describe_state(folder: Path, rows: list[dict[str, Any]]) -> str:
    """`running`, `finished`, `interrupted` by a signal, or `stopped` without a word."""
    if is_locked(folder / LOCK_FILE):
        return "running"
    if (folder / "adapter" / "adapter_config.json").is_file():
        return "finished"
    events = [row["event"] for row in rows if row.get("kind") == "event"]
    return "interrupted" if events and events[-1] == "preempted" else "stopped"


def last_change(folder: Path) -> str:
    """When the run's record was last written to, in local time."""
    file = folder / METRICS_FILE
    moment = (file if file.is_file() else folder).stat().st_mtime
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")


def read_config(folder: Path, notes: list[str]) -> RunConfig | None:
    """The run's settled configuration; None, with a note, where it cannot be read."""
    try:
        return load_run_yaml(folder / RUN_FILE)
    except ConfigError as error:
        notes.append(str(error))
        return None


def plan_peak(config: RunConfig) -> float | None:
    """Peak memory of a worker in GiB as `cqlora plan` has it; None for what an earlier cqlora has left to `auto`."""
    values = flatten(describe_config(config))
    if any(values.get(key) == "auto" for key in SETTLED_KEYS):
        return None
    try:
        base = read_base(config.model.path)
        rows = Rows(base.vocab_size, base.added_rows)
    except ModelError:
        rows = Rows(config.model.vocab_size)
    try:
        peak = plan_memory(config, rows).peak / GIB
    except CqloraError:
        return None
    return peak if math.isfinite(peak) else None


def read_mix(folder: Path, config: RunConfig, notes: list[str]) -> dict[str, Any] | None:
    """The summary of the token cache that the run has trained on; None, with a note, where it is not to be found."""
    fingerprint = find_cache(folder)
    if fingerprint is None:
        return None
    file = Path(config.data.cache_dir) / fingerprint[:32] / "summary.json"
    try:
        return read_object(file)
    except ModelError:
        notes.append(f"{file} is not here, so the mix is not shown; it is where the run was started, or built anew.")
        return None


def find_cache(folder: Path) -> str | None:
    """Fingerprint of the token cache, as the newest checkpoint that can be read has it."""
    for state in sorted((folder / "checkpoints").glob("step-*/state.json"), reverse=True):
        try:
            found = read_object(state).get("identity", {}).get("token_cache")
        except (ModelError, AttributeError):
            continue
        if isinstance(found, str):
            return found
    return None


def read_evaluation(folder: Path, notes: list[str]) -> list[dict[str, Any]] | None:
    """The models of evaluation.json, whose parts `cqlora evaluate` describes; None where there is no such file."""
    file = folder / EVALUATION_FILE
    if not file.exists():
        return None
    try:
        models = read_object(file).get("models")
    except ModelError as error:
        notes.append(str(error))
        return None
    return [keep_tables(model) for model in models if isinstance(model, dict)] if isinstance(models, list) else None


def keep_tables(model: dict[str, Any]) -> dict[str, Any]:
    """An evaluated model's name and its tables, whose rows are objects."""
    tables = {name: rows for name, rows in model.items() if name in ("text", "probe", "choice", "generations")}
    rows_of = {
        name: [row for row in rows if isinstance(row, dict)] for name, rows in tables.items() if isinstance(rows, list)
    }
    return {"name": str(model.get("name", ""))} | rows_of


def write_commands(folder: Path, config: RunConfig, settings: list[dict[str, Any]]) -> dict[str, str]:
    """What to type to go on with a run, and with what came out of it; `resume` only where its groups are ours."""
    place, base = shlex.quote(str(folder)), shlex.quote(config.model.path)
    adapter = shlex.quote(str(folder / "adapter"))
    commands = {
        "evaluate": f"cqlora evaluate run={place}",
        "merge": f"cqlora merge base={base} adapter={adapter} output_dir=models/merged",
        "chat": f"cqlora chat base={base} adapter={adapter}",
    }
    if not any("default" in setting for setting in settings):
        return commands
    words = [f"{group}={getattr(config, group).name}" for group in GROUPS]
    words += [f"{each['key']}={to_override(each['value'])}" for each in settings if each.get("changed")]
    return {"resume": f"cqlora run {shlex.join(words)} hydra.run.dir={place}"} | commands


def to_override(value: object) -> str:
    """A value as Hydra's grammar reads it behind `KEY=`."""
    if isinstance(value, list):
        return f"[{','.join(map(to_override, value))}]"
    if isinstance(value, str) and not _PLAIN_WORD.fullmatch(value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def to_json(page: dict[str, Any]) -> str:
    """JSON that may stand in a page's script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(page, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
