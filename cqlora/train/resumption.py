"""Where a run starts from: settled before its model is loaded and before anything in its folder changes."""

import logging
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cqlora.config.schema import RunConfig
from cqlora.errors import CheckpointError
from cqlora.system.metrics import METRICS_FILE, begins_as
from cqlora.train.checkpoint import CheckpointStore, find_damage, step_of
from cqlora.train.distributed import Worker
from cqlora.train.state import METRICS_KEY, read_state, require_same_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """What a run starts from."""

    checkpoint: Path | None
    """A whole checkpoint of the same run; None at step 0."""
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Newer checkpoints that were passed over: their folders' names, and what is wrong with each."""


def find_start(config: RunConfig, run_folder: Path, identity: dict[str, Any], worker: Worker) -> Start:
    """What `stage.resume` asks for in a run's folder; rank 0 looks, and every worker is told.

    Raises:
        CheckpointError: the checkpoint is damaged, of another run or would be overwritten, or metrics.jsonl is damaged.
        ModelError: files beside the base's weights are not those of the run that was stopped.
    """
    start: Start = worker.broadcast(choose_start(config.stage.resume, run_folder) if worker.is_main else None)
    if start.checkpoint is not None:
        require_same_run(identity, start.checkpoint, config.model)
    return start


def choose_start(asked: str, run_folder: Path) -> Start:
    """The checkpoint that is asked for, whole, with the metrics.jsonl that the run had then."""
    start = choose_checkpoint(asked, run_folder)
    if start.checkpoint is not None and start.checkpoint.resolve().parent.parent == run_folder.resolve():
        check_metrics(run_folder / METRICS_FILE, start.checkpoint)
    return start


def check_metrics(file: Path, checkpoint: Path) -> None:
    """Compare metrics.jsonl with what a checkpoint says of it; one without a word of it is of an older cqlora.

    Raises:
        CheckpointError: it does not begin as it was; moved away, it is not missed.
    """
    measured = read_state(checkpoint).get(METRICS_KEY)
    if measured is None:
        return
    if not file.exists():
        logger.warning("%s is not there; a new one begins after step %d", file, step_of(checkpoint))
    elif not begins_as(file, measured):
        raise CheckpointError(
            f"{file} is damaged: its first {measured['bytes']:,} bytes are not as they were when {checkpoint} was "
            f"written; restore it, or begin a new one after `mv {shlex.quote(str(file))} "
            f"{shlex.quote(f'{file}.damaged')}`."
        )


def choose_checkpoint(asked: str, run_folder: Path) -> Start:
    """The checkpoint that is asked for, every file of it as it was written."""
    store = CheckpointStore(run_folder / "checkpoints", keep_last=1)
    if asked == "auto":
        damaged: list[tuple[str, str]] = []
        newest = store.find_newest(lambda folder, damage: damaged.append((folder.name, damage)))
        return Start(newest, damaged)
    if asked == "never":
        if store.committed():
            raise CheckpointError(
                f"stage.resume=never would overwrite the checkpoints in {store.root}; use "
                "stage.resume=auto or another folder with hydra.run.dir=FOLDER."
            )
        return Start(None)
    if not Path(asked, "manifest.json").is_file():
        raise CheckpointError(f"stage.resume={asked} is not a checkpoint; use auto, never or a step-… folder.")
    damage = find_damage(Path(asked))
    if damage is not None:
        raise CheckpointError(f"stage.resume={asked} is damaged: {damage}; use auto, or another step-… folder.")
    return Start(Path(asked))
