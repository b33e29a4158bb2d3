"""A learning rate found by trying: a range test (Smith, 1506.01186, section 3.3) whose steps nothing is kept of.

The rate rises exponentially from step to step. What is looked at is how far each batch's loss lies below its loss
before the first step, since batches differ by more than a step teaches.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table

from cqlora.data.order import share_among_ranks
from cqlora.errors import TrainingError
from cqlora.model.batch import count_labels
from cqlora.model.evaluation import sum_losses
from cqlora.system.documents import write_json
from cqlora.system.progress import StageDisplay, open_console
from cqlora.train.trainer import Trainer, without_labels

FILE = "learning_rate.json"
LOWEST, HIGHEST, STEPS = 1e-6, 1e-1, 40
"""Eight steps for each power of ten."""
SMOOTHING = 0.7
"""Of the mean so far in the next one."""
DIVERGED = 0.5
"""Nats above the loss before the first step at which the sweep ends."""
RULE = "a tenth of the rate at which the smoothed loss is lowest"
_BAR_COLUMNS = 40


@dataclass(frozen=True, slots=True)
class Point:
    """One step of the sweep."""

    learning_rate: float
    loss: float
    """Of the step's batch, before the step is applied."""
    gain: float
    """By how much that is below the batch's loss before the first step, in nats a token."""
    smoothed_gain: float


def find_learning_rate(trainer: Trainer) -> float:
    """Sweep, show the curve, write learning_rate.json into the run's folder; return the rate to choose.

    Every group of parameters keeps its ratio to stage.learning_rate.

    Raises:
        TrainingError: no rate lowered the loss.
    """
    points = sweep(trainer)
    chosen = choose(points)
    if trainer.worker.is_main:
        found = {"version": 1, "rule": RULE, "learning_rate": chosen, "points": [asdict(point) for point in points]}
        write_json(trainer.run_folder / FILE, found)
        show(points, chosen, trainer.run_folder / FILE)
    return chosen


def rates() -> list[float]:
    """The sweep's learning rates, each the same multiple of the one before."""
    return [LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1)) for step in range(STEPS)]


def sweep(trainer: Trainer) -> list[Point]:
    """Train at rising rates until the loss diverges; the trainer's parameters are of no use afterwards."""
    with StageDisplay(trainer.worker.is_main) as display:
        before = []
        for step in range(STEPS):
            display.show("batches before training", step + 1, STEPS)
            before.append(score_batch(trainer, step))
        trainer.module.train()
        points: list[Point] = []
        for step, rate in enumerate(rates()):
            display.show("steps at rising rates", step + 1, STEPS)
            loss = take_step(trainer, rate)
            gain = before[step] - loss
            if not math.isfinite(gain):
                break
            points.append(Point(rate, loss, gain, smooth(gain, points)))
            if points[-1].smoothed_gain < -DIVERGED:
                break
    return points


def smooth(gain: float, points: list[Point]) -> float:
    """The exponential mean of gains so far; the first is a gain of nothing, since nothing has been trained."""
    return (1 - SMOOTHING) * gain + SMOOTHING * points[-1].smoothed_gain if points else gain


def take_step(trainer: Trainer, rate: float) -> float:
    """One optimizer step at `rate`; the loss of its batch before it is applied."""
    stage = trainer.config.stage
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * rate / stage.learning_rate
    result = trainer.accumulate(False)
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    trainer.module.zero_grad(set_to_none=True)
    trainer.counters.step += 1
    return result.loss


def score_batch(trainer: Trainer, step: int) -> float:
    """Loss of a step's batch under the parameters as they are."""
    worker = trainer.worker
    ids = trainer.order.packs_of_step(step)
    packs = {pack: trainer.split.pack(pack) for pack in ids}
    size = trainer.config.hardware.micro_batch_size
    shares = share_among_ranks(ids, worker.rank, worker.world_size, size)
    batches = [[packs[pack] for pack in share] or [without_labels(packs[ids[0]])] for share in shares]
    nats = torch.tensor([sum_losses(trainer.module, batches, worker.device)], dtype=torch.float64)
    return float(worker.sum(nats)) / max(1, count_labels(list(packs.values())))


def choose(points: list[Point]) -> float:
    """The rate by RULE, to two digits.

    Raises:
        TrainingError: no rate lowered the loss.
    """
    best = max(points, key=lambda point: point.smoothed_gain, default=None)
    if best is None or best.smoothed_gain <= 0:
        raise TrainingError(
            f"no learning rate from {LOWEST:g} to {HIGHEST:g} lowered the loss, so none can be chosen; look at the "
            "data, or raise stage.global_batch_size."
        )
    return float(f"{best.learning_rate / 10:.1e}")


def show(points: list[Point], chosen: float, file: Path) -> None:
    """The curve, a line for each rate, and the choice with its rule."""
    console = open_console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("learning rate", "loss", "below its start"):
        table.add_column(name, justify="right")
    table.add_column("")
    highest = max(point.smoothed_gain for point in points)
    for point in points:
        bar = "█" * round(_BAR_COLUMNS * max(0.0, point.smoothed_gain) / highest)
        mark = " ← lowest" if point.smoothed_gain == highest else ""
        table.add_row(f"{point.learning_rate:.1e}", f"{point.loss:.3f}", f"{point.smoothed_gain:+.3f}", f"{bar}{mark}")
    console.print(table)
    console.print(f"stage.learning_rate={chosen:g}  {RULE}\n{file}", soft_wrap=True)
