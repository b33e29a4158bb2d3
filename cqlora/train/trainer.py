"""The step loop: micro batches, one global mean, clip, step, log, evaluate, commit."""

import logging
import math
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cqlora.config.choices import Precision
from cqlora.config.schema import RunConfig
from cqlora.data.cache import Pack, TokenCache
from cqlora.data.order import StepOrder, share_among_ranks
from cqlora.errors import Preempted, TrainingError
from cqlora.model.batch import build_batch, count_labels
from cqlora.model.evaluation import Evaluation, sum_losses
from cqlora.model.fused.linear import adapters_cast_once
from cqlora.model.noise import EmbeddingNoise
from cqlora.model.placement import accumulate_without_sync, unwrap
from cqlora.model.throughput import count_flops_per_token, measure_matmul_flops
from cqlora.system.progress import StepDisplay
from cqlora.system.signals import finish_first
from cqlora.train.checkpoint import CheckpointStore, step_of
from cqlora.train.distributed import Worker
from cqlora.train.forgetting import ProbePattern, find_forgotten, read_start
from cqlora.train.optimizer import set_learning_rate
from cqlora.train.resumption import Start
from cqlora.train.state import Counters, restore_state, save_state
from cqlora.train.tracking import MetricsLog

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StepResult:
    """What a step's forward and backward passes over all workers came to."""

    summed_loss: np.ndarray[Any, np.dtype[np.float64]]
    """(S,) summed token losses of each source."""
    labels: np.ndarray[Any, np.dtype[np.float64]]
    """(S,) label tokens of each source."""
    tokens: int
    grad_norm: float
    stop_asked: bool
    """Whether any worker was signalled."""

    @property
    def loss(self) -> float:
        """Mean over the label tokens of the global batch."""
        return float(self.summed_loss.sum() / max(self.labels.sum(), 1.0))


class Trainer:
    """Trains one placed objective on one token cache, in one run folder."""

    def __init__(
        self,
        config: RunConfig,
        worker: Worker,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        cache: TokenCache,
        metrics: MetricsLog,
        run_folder: Path,
        probe: Sequence[ProbePattern] = (),
    ) -> None:
        self.config = config
        self.worker = worker
        self.module = module
        self.optimizer = optimizer
        self.cache = cache
        self.metrics = metrics
        self.run_folder = run_folder
        self.probe = probe
        self.store = CheckpointStore(run_folder / "checkpoints", config.stage.keep_last)
        self.split = cache.splits["train"]
        self.order = StepOrder(len(self.split), config.stage.global_batch_size, config.seed)
        self.total_steps = count_total_steps(config, cache)
        self.counters = Counters()
        scaled = config.hardware.precision is Precision.float16
        self.scaler = torch.amp.GradScaler(worker.device.type, enabled=scaled)
        self._trainable = [p for p in module.parameters() if p.requires_grad]

    def resume(self, identity: dict[str, Any], start: Start) -> None:
        """Go on from where the run starts; `identity` is what must not have changed when it is resumed."""
        self.identity = identity
        for name, damage in start.damaged:
            self.metrics.event(step_of(Path(name)), "damaged_checkpoint", checkpoint=name, damage=damage)
        if start.checkpoint is None:
            self.metrics.rewind(-1)
            return
        self.counters = restore_state(
            start.checkpoint, self.worker, self.config.hardware.strategy, self.module, self.optimizer, self.scaler
        )
        self.metrics.rewind(self.counters.step)
        self.metrics.event(self.counters.step, "resumed", checkpoint=start.checkpoint.name)
        if self.worker.gpus:
            logger.info(
                "going on from %s with every bit that it holds; a GPU's kernels add in no fixed order, so that later "
                "losses are those of a run that never stopped but for their rounding",
                start.checkpoint.name,
            )

    def fit(self) -> None:
        """Train to the last step, evaluating and committing on the way and at the end.

        Raises:
            Preempted: a signal came; the step was finished and committed.
            TrainingError: too many non-finite steps in a row.
        """
        stage = self.config.stage
        self._measure_speed()
        for gpu in self.worker.gpus:
            # What loading took at its most is not the step's.
            torch.cuda.reset_peak_memory_stats(gpu)
        # Loading leaves a model in evaluation mode, in which activations are never checkpointed nor dropped.
        self.module.train()
        display = StepDisplay(self.total_steps, self.worker.is_main)
        if self.counters.step == 0:
            # A signal ends it at once, since there is nothing to commit yet.
            with display:
                self.evaluate(display)
        with finish_first(tell_signal) as signals, display:
            while self.counters.step < self.total_steps:
                result = self.train_step(signals, display)
                done = self.counters.step == self.total_steps
                if done or (stage.eval_every_steps and self.counters.step % stage.eval_every_steps == 0):
                    self.evaluate(display)
                if done or result.stop_asked or self.counters.step % stage.checkpoint_every_steps == 0:
                    self.commit()
                if result.stop_asked and not done:
                    self._leave()

    def train_step(self, signals: list[int], display: StepDisplay) -> StepResult:
        """One optimizer step over the global batch, applied only when it is finite, and its line of metrics."""
        started = time.perf_counter()
        rate = set_learning_rate(self.optimizer, self.config.stage, self.counters.step, self.total_steps)
        result = self.accumulate(bool(signals))
        self.counters.step += 1
        self.counters.tokens += result.tokens
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            self.scaler.step(self.optimizer)
            self.counters.bad_steps = 0
            self.counters.applied += 1
            self._log_step(result, rate, time.perf_counter() - started, display)
        else:
            self._skip_step(result)
        self.scaler.update()
        self.module.zero_grad(set_to_none=True)
        return result

    def accumulate(self, stop_asked: bool) -> StepResult:
        """Forward and backward over this worker's micro batches; gradients end as the mean over all label tokens."""
        ids = self.order.packs_of_step(self.counters.step)
        packs = {pack: self.split.pack(pack) for pack in ids}
        divisor = max(1, count_labels(list(packs.values())))
        shares = share_among_ranks(ids, self.worker.rank, self.worker.world_size, self.config.hardware.micro_batch_size)
        losses, sources = [], []
        with adapters_cast_once(self.module, unwrap(self.module).dtype):
            for number, share in enumerate(shares):
                batch = build_batch([packs[i] for i in share] or [without_labels(packs[ids[0]])], self.worker.device)
                last = number == len(shares) - 1
                with nullcontext() if last else accumulate_without_sync(self.module):
                    loss, token_losses = self.module(batch, divisor, self._noise(number))
                    # Replication and sharding average over workers; the divisor is global already.
                    self.scaler.scale(loss * self.worker.world_size).backward()
                losses.append(token_losses)
                sources.append(batch.label_sources)
        sums = self.worker.sum(self._sum_by_source(torch.cat(losses), torch.cat(sources), stop_asked))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._trainable, self.config.stage.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return StepResult(
            summed_loss=sums[0, :-1].numpy(),
            labels=sums[1, :-1].numpy(),
            tokens=sum(len(pack.token_ids) for pack in packs.values()),
            grad_norm=float(norm),
            stop_asked=bool(sums[0, -1] > 0),
        )

    def _sum_by_source(self, token_losses: torch.Tensor, sources: torch.Tensor, stop_asked: bool) -> torch.Tensor:
        """(2, sources + 1) float64 on the host: losses, label tokens; the last column tells of a signal."""
        sums = torch.zeros(2, len(self.cache.sources) + 1, dtype=torch.float64)
        sums[0].index_add_(0, sources, token_losses.double().cpu())
        sums[1].index_add_(0, sources, torch.ones(len(sources), dtype=torch.float64))
        sums[0, -1] = float(stop_asked)
        return sums

    def _noise(self, micro_batch: int) -> EmbeddingNoise | None:
        alpha, place = self.config.stage.neftune_alpha, (self.worker.rank, micro_batch)
        return EmbeddingNoise(alpha, (self.config.seed, self.counters.step, *place)) if alpha else None

    def evaluate(self, display: StepDisplay) -> None:
        """Evaluate every source's held-out text and log it."""
        rows = []
        for source, result in self.evaluate_sources("val", display):
            row = {
                "kind": "eval",
                "step": self.counters.step,
                "source": source.name,
                "language": source.language,
                "loss": result.loss,
                "perplexity": result.perplexity,
                "bits_per_character": result.bits_per_character,
                "bits_per_byte": result.bits_per_byte,
                "tokens": result.tokens,
            }
            self.metrics.log(row)
            display.show_evaluation(row)
            rows.append(row)
        self.metrics.log_mean(rows)
        for row in self.score_probe():
            self.metrics.log(row)
            rows.append(row)
        self.tell_forgetting(rows)

    def score_probe(self) -> Iterator[dict[str, Any]]:
        """A line for each pattern of the in-context probe; every worker computes all of it."""
        for pattern in self.probe:
            yield {"kind": "probe", "step": self.counters.step} | pattern.score(self.module, self.worker.device)

    def tell_forgetting(self, rows: list[dict[str, Any]]) -> None:
        """Mark, and say, what has become dearer than it may since the run's start."""
        most = self.config.stage.max_forgetting
        if most is not None and self.worker.is_main:
            for found in find_forgotten(read_start(self.run_folder), rows, most):
                self.metrics.event(self.counters.step, "forgetting", **found)

    def evaluate_sources(self, split: str, display: StepDisplay) -> Iterator[tuple[Any, Evaluation]]:
        """Each source of a split with its evaluation, shared among the workers; sources without text are left out."""
        stage = self.config.stage
        limits = (stage.eval_tokens, 0) if stage.eval_characters is None else (0, stage.eval_characters)
        for source_id, source in enumerate(self.cache.sources):
            packs = self.cache.splits[split].packs_of(source_id, *limits) if split in self.cache.splits else []
            labels = count_labels(packs)
            if not labels:
                continue
            shares = share_among_ranks(
                list(range(len(packs))),
                self.worker.rank,
                self.worker.world_size,
                self.config.hardware.micro_batch_size,
            )
            batches = [[packs[i] for i in share] or [without_labels(packs[0])] for share in shares]
            summed_loss = torch.tensor(
                [sum_losses(self.module, display.follow(source.name, batches), self.worker.device)], dtype=torch.float64
            )
            yield (
                source,
                Evaluation(
                    summed_loss=float(self.worker.sum(summed_loss)),
                    tokens=labels,
                    characters=sum(sum(pack.characters) for pack in packs),
                    bytes=sum(sum(pack.bytes) for pack in packs),
                ),
            )

    def commit(self) -> None:
        """Put the run's whole state on the disk."""
        save_state(
            self.store,
            self.worker,
            self.config.hardware.strategy,
            self.counters,
            self.identity,
            self.module,
            self.optimizer,
            self.scaler,
        )
        self.metrics.event(self.counters.step, "checkpoint")

    def _log_step(self, result: StepResult, rate: float, seconds: float, display: StepDisplay) -> None:
        labels = float(result.labels.sum())
        flops = self._flops[0] * result.tokens + self._flops[1] * labels
        row = {
            "kind": "train",
            "step": self.counters.step,
            "loss": result.loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "tokens": self.counters.tokens,
            "tokens_per_second": result.tokens / seconds,
            "peak_memory_gib": peak_memory_gib(self.worker.gpus),
            "seconds": seconds,
            "matmul_share": flops / seconds / self._matmul_limit,
        }
        for source, summed_loss, count in zip(self.cache.sources, result.summed_loss, result.labels, strict=True):
            if count:
                row[f"loss/{source.name}/{source.language}"] = float(summed_loss / count)
        self.metrics.log(row)
        display.show_step(row)

    def _skip_step(self, result: StepResult) -> None:
        # A scaler that still looks for its scale overflows by design; only a loss tells then.
        if not (self.scaler.is_enabled() and math.isfinite(result.loss)):
            self.counters.bad_steps += 1
        self.metrics.event(self.counters.step, "skipped_step", loss=result.loss, grad_norm=result.grad_norm)
        if self.counters.bad_steps >= self.config.stage.max_bad_steps:
            last = next(iter(self.store.committed()), None)
            raise TrainingError(
                f"{self.counters.bad_steps} steps in a row were not finite, the last being {self.counters.step}; "
                f"{f'{last} stands' if last else 'nothing was saved yet'}: lower stage.learning_rate or "
                "look at the data."
            )
        if self.counters.step == self.total_steps and not self.counters.applied:
            raise TrainingError(
                f"none of the {self.total_steps} steps was finite, so nothing was trained and no adapter is written; "
                "lower stage.learning_rate, look at the data, or train for more steps."
            )

    def _leave(self) -> None:
        self.metrics.event(self.counters.step, "preempted")
        raise Preempted(
            f"stopped by a signal after step {self.counters.step} of {self.total_steps}, which is committed; the same "
            f"command with hydra.run.dir={self.run_folder} goes on."
        )

    def _measure_speed(self) -> None:
        objective = unwrap(self.module)
        self._matmul_limit = self.worker.world_size * measure_matmul_flops(self.worker.device, objective.dtype)
        self._flops = count_flops_per_token(objective.model)


def count_total_steps(config: RunConfig, cache: TokenCache) -> int:
    """Optimizer steps of the whole run."""
    order = StepOrder(len(cache.splits["train"]), config.stage.global_batch_size, config.seed)
    return config.stage.max_steps or order.count_steps(config.stage.epochs or 1.0)


def without_labels(pack: Pack) -> Pack:
    """A pack that is computed and counts for nothing, for a worker that has none left in an uneven step."""
    return replace(pack, label_mask=np.zeros_like(pack.label_mask))


def tell_signal(number: int) -> None:
    """Say that a signal was heard in the midst of a step."""
    logger.info("%s: finishing the step, then committing", signal.Signals(number).name)


def peak_memory_gib(gpus: Sequence[torch.device]) -> float:
    """Most memory this worker has used: reserved by the allocator on the fullest of its GPUs, else resident."""
    if gpus:
        return max(torch.cuda.max_memory_reserved(gpu) for gpu in gpus) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
