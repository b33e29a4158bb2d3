"""Where a run's numbers go: metrics.jsonl always, a tracker through Accelerate; rank 0 alone writes."""

import logging
import math
import netrc
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from cqlora.base import read_card
from cqlora.config.choices import Goal, Tracker, TrackingMode
from cqlora.config.run_yaml import describe_config, flatten, list_changes
from cqlora.config.schema import RunConfig
from cqlora.config.tracking import TrackingConfig
from cqlora.errors import TrainingError
from cqlora.system.durable import replace_file
from cqlora.system.metrics import (
    MEAN_LOSS,
    append_metrics,
    mean_loss,
    name_replies,
    name_values,
    read_metrics,
    rewind_metrics,
)

logger = logging.getLogger(__name__)

_RUN_ID_FILE, _MLFLOW_ID_FILE = "wandb_run_id", "mlflow_run_id"
TOKENS = "train/tokens"
"""What curves are drawn over: tokens trained on so far."""


class MetricsLog:
    """metrics.jsonl of a run, and its trackers. On every rank but the first it swallows what it is given."""

    def __init__(self, run_folder: Path | None, trackers: list[GeneralTracker]) -> None:
        self._run_folder = run_folder
        self._trackers = trackers
        rows = read_metrics(run_folder) if run_folder else []
        trained = [row["tokens"] for row in rows if row["kind"] == "train"]
        self._tokens = trained[-1] if trained else 0

    def log(self, row: dict[str, Any]) -> None:
        """Add one line of metrics; `row` has `kind` and `step`."""
        if self._run_folder is None:
            return
        append_metrics(self._run_folder, row)
        numbers = name_values(row)
        if row["kind"] == "train":
            self._tokens = row["tokens"]
        for tracker in self._trackers:
            if numbers:
                tracker.log({**numbers, TOKENS: self._tokens}, step=row["step"])

    def log_mean(self, evaluations: list[dict[str, Any]]) -> None:
        """Give the trackers one held-out loss over all sources, to compare runs by: the mean over all tokens."""
        loss = mean_loss(evaluations)
        for tracker in self._trackers:
            if loss is not None and math.isfinite(loss):
                tracker.log({MEAN_LOSS: loss, TOKENS: self._tokens}, step=evaluations[0]["step"])

    def log_replies(self, step: int, replies: list[dict[str, Any]]) -> None:
        """Add a line for each reply, and give the trackers all replies of the run so far as a table."""
        if self._run_folder is None:
            return
        for reply in replies:
            self.log({"kind": "reply", "step": step, **reply})
        said = [row for row in read_metrics(self._run_folder) if row["kind"] == "reply"]
        means = name_replies([row for row in said if row["step"] == step])
        for tracker in self._trackers:
            tracker.log({**means, TOKENS: self._tokens}, step=step)
            log_table(tracker, "eval/replies", [{key: row[key] for key in row if key != "kind"} for row in said], step)

    def event(self, step: int, event: str, **details: Any) -> None:
        """Say that something happened, in metrics.jsonl and in the log."""
        self.log({"kind": "event", "step": step, "event": event, **details})
        if self._run_folder is not None:
            logger.info("step %d: %s %s", step, event, " ".join(f"{k}={v}" for k, v in details.items()))

    def note(self, name: str, value: float) -> None:
        """Give W&B a number that holds for the whole run, to stand beside what is measured."""
        for tracker in self._trackers:
            if isinstance(tracker, WandBTracker):
                tracker.tracker.summary[name] = value

    def log_adapter(self, folder: Path) -> None:
        """Give W&B the finished adapter, with what its card says of tokenizer and base."""
        for tracker in self._trackers:
            if isinstance(tracker, WandBTracker):
                import wandb

                card = read_card(folder)
                artifact = wandb.Artifact(f"adapter-{tracker.tracker.id}", type="adapter", metadata=card)
                artifact.add_dir(str(folder))
                tracker.tracker.log_artifact(artifact)

    def rewind(self, step: int) -> None:
        """Forget what was measured after `step`, which will be measured again."""
        if self._run_folder is not None:
            rewind_metrics(self._run_folder, step)


@contextmanager
def open_metrics_log(config: RunConfig, run_folder: Path, is_main: bool) -> Iterator[MetricsLog]:
    """The metrics of the run in `run_folder`, its trackers closed at the end whatever happens."""
    trackers = start_trackers(config, run_folder) if is_main else []
    try:
        yield MetricsLog(run_folder if is_main else None, trackers)
    finally:
        for tracker in trackers:
            tracker.finish()


def start_trackers(config: RunConfig, run_folder: Path) -> list[GeneralTracker]:
    """The tracker that `tracking` names, started with the run's configuration."""
    chosen = config.tracking.tracker
    if chosen is Tracker.none:
        return []
    start = {
        Tracker.tensorboard: start_tensorboard,
        Tracker.trackio: start_trackio,
        Tracker.mlflow: start_mlflow,
        Tracker.wandb: start_wandb,
    }[chosen]
    return [start(config, run_folder)]


def start_tensorboard(config: RunConfig, run_folder: Path) -> GeneralTracker:
    """Events in the run's folder."""
    tracker = TensorBoardTracker("tensorboard", logging_dir=run_folder)
    tracker.start()
    tracker.store_init_configuration(to_flat_words(config))
    return tracker


def start_trackio(config: RunConfig, run_folder: Path) -> GeneralTracker:
    """Rows in trackio's database on this machine; a run that goes on keeps its name, and so its row."""
    group = sweep_group(run_folder)
    tracker = TrackioTracker(
        config.tracking.project, name=name_run(config, run_folder), group=group, resume="allow", embed=False
    )
    tracker.start()
    tracker.store_init_configuration(to_flat_words(config))
    return tracker


def start_mlflow(config: RunConfig, run_folder: Path) -> GeneralTracker:
    """An MLflow run, by its id the same when the run goes on."""
    file = run_folder / _MLFLOW_ID_FILE
    earlier = file.read_text(encoding="utf-8") if file.is_file() else None
    tracker = MLflowTracker(config.tracking.project, run_id=earlier, run_name=name_run(config, run_folder))
    tracker.start()
    if earlier is None:
        # MLflow takes a parameter once, and a run that goes on may have others in what changes no result.
        tracker.store_init_configuration(to_flat_words(config))
        replace_file(file, tracker.tracker.info.run_id.encode())
    return tracker


def start_wandb(config: RunConfig, run_folder: Path) -> GeneralTracker:
    """A W&B run, its files in the run's folder.

    Raises:
        TrainingError: W&B cannot be reached, or does not let the run in.
    """
    # W&B reads these two when it is imported; it need not chat.
    os.environ["WANDB_DIR"] = str(run_folder)
    os.environ.setdefault("WANDB_SILENT", "true")
    tracker = WandBTracker(config.tracking.project, **wandb_options(config, run_folder))
    from wandb.errors import Error

    try:
        tracker.start()
    except Error as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise TrainingError(
            f"W&B cannot be written to ({reason}); add tracking.mode=offline, or tracking=none, or reach it."
        ) from error
    tracker.store_init_configuration({**flatten(describe_config(config)), "changed": list_changes(config)})
    define_metrics(tracker.tracker, config)
    for line in describe_wandb(tracker.tracker, run_folder):
        logger.info(line)
    return tracker


def log_table(tracker: GeneralTracker, name: str, rows: list[dict[str, Any]], step: int) -> None:
    """Give a tracker rows of the same keys as a table of its own kind, or as text where it has none."""
    columns, data = list(rows[0]), [list(row.values()) for row in rows]
    if isinstance(tracker, WandBTracker):
        tracker.log_table(name, columns=columns, data=data, step=step)
    elif isinstance(tracker, TrackioTracker):
        import trackio

        tracker.log({name: trackio.Table(columns=columns, data=data)}, step=step)
    elif isinstance(tracker, MLflowTracker):
        import mlflow

        mlflow.log_dict({"columns": columns, "data": data}, f"{name}.json")
    elif isinstance(tracker, TensorBoardTracker):
        tracker.writer.add_text(name, to_markdown(columns, data), step)


def to_markdown(columns: list[str], data: list[list[Any]]) -> str:
    """A table whose cells are text, whatever they hold."""

    def line(cells: list[Any]) -> str:
        told = ["<br>".join(escape(str(cell)).splitlines()).replace("|", "&#124;") for cell in cells]
        return f"| {' | '.join(told)} |"

    return "\n".join([line(columns), "|---" * len(columns) + "|", *map(line, data)])


def to_flat_words(config: RunConfig) -> dict[str, Any]:
    """The configuration under dotted keys for trackers that take no nested values and no lists."""
    values = flatten(describe_config(config)).items()
    return {key: value if isinstance(value, str | int | float) else str(value) for key, value in values}


def name_run(config: RunConfig, run_folder: Path) -> str:
    """What a tracker's page calls the run."""
    return config.tracking.name or f"{config.stage.name}-{config.model.name}-{run_folder.name}"


def describe_wandb(run: Any, run_folder: Path) -> list[str]:
    """Where a W&B run is to be seen, or how it gets there; W&B itself is told to keep silent."""
    if not run.offline:
        return [f"W&B: {run.url}"]
    # All segments of a run that was resumed, which W&B takes in the order of their start.
    segments = f"{shlex.quote(str(run_folder))}/wandb/offline-run-*"
    return [f"W&B is offline and writes to {Path(run.dir).parent}", f"upload it with: wandb sync {segments}"]


def wandb_options(config: RunConfig, run_folder: Path) -> dict[str, Any]:
    """What `wandb.init` is given: names that W&B's sweep and group pages sort by, and an id that survives resume."""
    tracking = config.tracking
    options: dict[str, Any] = {
        "name": name_run(config, run_folder),
        "dir": str(run_folder),
        "id": run_id(run_folder),
        "resume": "allow",
        "mode": wandb_mode(tracking),
        "entity": tracking.entity,
        "group": tracking.group or sweep_group(run_folder),
        "job_type": tracking.job_type or config.stage.name,
        "tags": [config.model.name, config.data.name, config.hardware.name, *tracking.tags],
    }
    if "WANDB_SWEEP_ID" in os.environ:
        # The agent has chosen the run's id already.
        del options["id"], options["resume"]
    return options


def wandb_mode(tracking: TrackingConfig) -> str:
    """`online` or `offline`; `auto` is online when a key is in the environment or in ~/.netrc."""
    if tracking.mode is not TrackingMode.auto:
        return tracking.mode.name
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")


def has_wandb_key() -> bool:
    """Whether W&B can log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except FileNotFoundError:
        return False


def run_id(run_folder: Path) -> str:
    """The W&B id of a run folder, the same when the run is resumed."""
    file = run_folder / _RUN_ID_FILE
    if not file.is_file():
        replace_file(file, os.urandom(6).hex().encode())
    return file.read_text(encoding="utf-8")


def sweep_group(run_folder: Path) -> str | None:
    """Jobs of one sweep, whose folders are numbered inside the sweep's, share its folder as a group."""
    return f"{run_folder.parent.parent.name}-{run_folder.parent.name}" if run_folder.name.isdigit() else None


def define_metrics(run: Any, config: RunConfig) -> None:
    """Let W&B draw everything over trained tokens, and summarise what the sweep compares by its goal."""
    run.define_metric(TOKENS)
    run.define_metric("train/*", step_metric=TOKENS)
    run.define_metric("eval/*", step_metric=TOKENS)
    for metric, goal in config.sweep.goals.items():
        best = "min" if goal is Goal.minimize else "max"
        run.define_metric(metric, step_metric=TOKENS, summary=f"{best},last")
