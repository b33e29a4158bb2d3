"""One training run from a settled configuration: the table of contents."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cqlora.base import ADAPTER_WEIGHTS, Base, check_companions, fingerprint_tokenizer, fingerprint_weights
from cqlora.config.choices import AdapterMethod
from cqlora.config.run_yaml import RUN_FILE, write_run_yaml
from cqlora.config.schema import SETTLED, RunConfig
from cqlora.data.cache import TokenCache, prepare_cache, unevaluated_sources
from cqlora.errors import DataError
from cqlora.model.adapters import adapter_state, attach_adapter, save_adapter
from cqlora.model.fused import fuse_blocks
from cqlora.model.load import COMPUTE_DTYPES, checkpoint_activations, open_model
from cqlora.model.objective import Objective
from cqlora.model.pissa import convert_to_lora, initialise_pissa
from cqlora.model.placement import place, unwrap
from cqlora.model_card import adapter_page
from cqlora.plan.estimate import GIB
from cqlora.plan.memory import plan_memory
from cqlora.plan.workload import Rows
from cqlora.random_base import open_base
from cqlora.system.companions import ACCEPT_IN_RUN, hash_companions
from cqlora.system.metrics import read_metrics
from cqlora.system.progress import StageDisplay, show_part
from cqlora.system.sealed import hash_file
from cqlora.system.signals import finish_first, preempt_on_signals
from cqlora.train.checkpoint import step_of
from cqlora.train.distributed import Worker, seed_everything, start_worker
from cqlora.train.export import describe_card
from cqlora.train.forgetting import encode_probe
from cqlora.train.generations import encode_questions
from cqlora.train.learning_rate import find_learning_rate
from cqlora.train.memory import described_when_full
from cqlora.train.optimizer import build_optimizer
from cqlora.train.resumption import Start, find_start
from cqlora.train.state import COMPANIONS_KEY, describe_identity
from cqlora.train.tracking import MetricsLog, open_metrics_log
from cqlora.train.trainer import Trainer, count_total_steps

logger = logging.getLogger(__name__)


def train(config: RunConfig, run_folder: Path) -> Path:
    """Train an adapter; return the run's folder, which ends with metrics.jsonl, checkpoints/ and adapter/.

    Workers that were started each on their own may each have named another folder: rank 0's is the run's. Nothing
    in it changes, and no tracker starts, before the run is accepted.

    Raises:
        CqloraError: the run is refused or cannot go on; Preempted when a signal has stopped it.
    """
    run_folder = run_folder.resolve()

    def again() -> str:
        goes_on = (run_folder / RUN_FILE).exists()
        return f"the same command with hydra.run.dir={run_folder} {'goes on' if goes_on else 'starts it'}."

    with preempt_on_signals(again), start_worker(config.hardware) as worker, described_when_full(config, worker.gpus):
        run_folder = agree_on_folder(run_folder, worker)
        train_as(worker, agree_on_values(config, worker), run_folder)
    return run_folder


def train_as(worker: Worker, config: RunConfig, run_folder: Path) -> None:
    """One worker's part of the run, from the seed to the saved adapter."""
    seed_everything(config.seed)
    base = worker.first(lambda: open_base(config.model))
    cache = open_cache(config, base, worker)
    total_steps = count_total_steps(config, cache)
    identity = worker.first(lambda: identify(config, base, cache, total_steps))
    start = find_start(config, run_folder, identity, worker)
    if has_ended(config, start, total_steps, run_folder):
        return
    card = describe_card(config)

    dtype = COMPUTE_DTYPES[config.hardware.precision]
    with show_part(f"loading the base {base.path}", worker.is_main):
        frozen, fill = open_model(base, config.model, config.hardware, worker.device, dtype)
    model = attach_adapter(frozen, base, config.lora, config.stage.embeddings, config.stage.init_adapter)
    with accept(config, run_folder, worker) as metrics:
        planned = plan_memory(config, Rows(base.vocab_size, base.added_rows))
        metrics.note("plan/peak_memory_gib", planned.peak / GIB)
        if config.lora.method is AdapterMethod.pissa:
            iterations = config.lora.pissa_iterations
            with show_part("decomposing the base's matrices for PiSSA", worker.is_main):
                worker.first(lambda: initialise_pissa(model, base, run_folder, iterations, config.seed))
        checkpoint_activations(model, config.hardware.activation_checkpointing)
        fused = fuse_blocks(model, config.hardware.kernels)
        with show_part("placing the model", worker.is_main):
            module = place(Objective(model, dtype, autocast=not fused), config.hardware, worker.device, fill)
        optimizer = build_optimizer(module, config.stage, config.lora.b_learning_rate_ratio)

        probe = encode_probe(base, config.seed) if config.stage.eval_probe else []
        questions = encode_questions(base, config.stage)
        trainer = Trainer(config, worker, module, optimizer, cache, metrics, run_folder, probe, questions)
        seed_everything(config.seed, worker.rank)
        trainer.resume(identity, start)
        if config.stage.find_learning_rate:
            find_learning_rate(trainer)
            return
        trainer.fit()
        with finish_first():
            save_final(config, trainer, base, card, run_folder)
            if config.tracking.log_adapter and worker.is_main:
                metrics.log_adapter(run_folder / "adapter")


def has_ended(config: RunConfig, start: Start, total_steps: int, run_folder: Path) -> bool:
    """Whether the run has done all its steps and written its adapter, which is said."""
    if start.checkpoint is None or config.stage.find_learning_rate or not (run_folder / "adapter").is_dir():
        return False
    if step_of(start.checkpoint) < total_steps:
        return False
    logger.info(
        "%s has finished already, after %d steps; for another run give another folder with hydra.run.dir=FOLDER",
        run_folder, total_steps,
    )  # fmt: skip
    return True


@contextmanager
def accept(config: RunConfig, run_folder: Path, worker: Worker) -> Iterator[MetricsLog]:
    """From here on the run is the one in its folder: rank 0 writes run.yaml and opens metrics.jsonl."""
    if worker.is_main:
        write_run_yaml(config, run_folder)
    with open_metrics_log(config, run_folder, worker.is_main) as metrics:
        yield metrics


def agree_on_folder(own: Path, worker: Worker) -> Path:
    """Rank 0's folder; another that this worker's own start has made and not used is removed."""
    run_folder: Path = worker.broadcast(own)
    if own != run_folder and own.is_dir() and not any(own.iterdir()):
        own.rmdir()
    return run_folder


def agree_on_values(config: RunConfig, worker: Worker) -> RunConfig:
    """The configuration with the values that rank 0 has settled, whose machine may not be this worker's."""
    own = {
        group: {name: getattr(node, name) for name in names if hasattr(node, name)}
        for group, names in SETTLED.items()
        for node in [getattr(config, group)]
    }
    settled: dict[str, dict[str, Any]] = worker.broadcast(own)
    changed: dict[str, Any] = {group: replace(getattr(config, group), **values) for group, values in settled.items()}
    return replace(config, **changed)


def open_cache(config: RunConfig, base: Base, worker: Worker) -> TokenCache:
    """The run's token cache, built by rank 0 where it is missing, and read whole once on each node to verify it.

    Raises:
        DataError: the cache holds nothing to train on.
    """
    with StageDisplay(worker.is_main) as display:
        cache = worker.first(lambda: prepare_cache(config, base, display.show, verify=worker.leads_node))
    if not len(cache.splits["train"]):
        raise DataError(f"data={config.data.name} holds no document to train on; look at {cache.folder}/summary.json.")
    for source in unevaluated_sources(cache):
        logger.warning("source %s has no held-out text and is not evaluated: raise data.val_fraction", source)
    logger.info(
        "token cache %s: %d packs of %d tokens", cache.folder, len(cache.splits["train"]), cache.sequence_length
    )
    return cache


def identify(config: RunConfig, base: Base, cache: TokenCache, total_steps: int) -> dict[str, Any]:
    """What a resumed run must share with the one that was stopped.

    Raises:
        ModelError: a file beside the base's weights is not the one that the base's card, or that of the adapter to
            continue, tells of.
    """
    accepted = config.model.accept_changed
    check_companions(base.path, base.path, ACCEPT_IN_RUN, accepted)
    fingerprints: dict[str, Any] = {
        "token_cache": cache.fingerprint,
        "tokenizer": fingerprint_tokenizer(base.path),
        "base": fingerprint_weights(base.path),
        COMPANIONS_KEY: hash_companions(base.path),
    }
    if config.stage.init_adapter:
        check_companions(base.path, Path(config.stage.init_adapter), ACCEPT_IN_RUN, accepted)
        fingerprints["init_adapter"] = hash_file(Path(config.stage.init_adapter, ADAPTER_WEIGHTS))
    return describe_identity(config, fingerprints, total_steps)


def save_final(config: RunConfig, trainer: Trainer, base: Base, card: dict[str, Any], run_folder: Path) -> None:
    """Write adapter/; every worker takes part in gathering it, rank 0 writes."""
    model = unwrap(trainer.module).model
    state = adapter_state(model)
    if config.lora.method is AdapterMethod.pissa:
        state = convert_to_lora(model, state, run_folder)
    if trainer.worker.is_main:
        page = adapter_page(config, read_metrics(run_folder))
        save_adapter(model, run_folder / "adapter", base, state, config.stage.name, card, page)
    trainer.worker.wait()
