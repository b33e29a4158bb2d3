"""Where a run starts from: settled before its model is loaded and before anything in its folder changes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cqlora.errors import CheckpointError
from cqlora.train.checkpoint import CheckpointStore, find_damage
from cqlora.train.distributed import Worker
from cqlora.train.state import require_same_run


@dataclass(frozen=True, slots=True)
class Start:
    """What a run starts from."""

    checkpoint: Path | None
    """A whole checkpoint of the same run; None at step 0."""
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Newer checkpoints that were passed over: their folders' names, and what is wrong with each."""


def find_start(asked: str, run_folder: Path, identity: dict[str, Any], worker: Worker) -> Start:
    """What `stage.resume` asks for in a run's folder; rank 0 looks and tells the others.

    Raises:
        CheckpointError: the checkpoint is damaged or of another run, or would be overwritten.
    """
    start: Start = worker.broadcast(choose_checkpoint(asked, run_folder) if worker.is_main else None)
    if start.checkpoint is not None:
        require_same_run(identity, start.checkpoint)
    return start


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
