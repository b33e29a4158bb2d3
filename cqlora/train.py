"""One training run from a frozen configuration: the table of contents."""

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from cqlora.base import Base, fingerprint_tokenizer, fingerprint_weights
from cqlora.checkpoint import hash_file
from cqlora.choices import AdapterMethod
from cqlora.config import RunConfig
from cqlora.data.cache import TokenCache, prepare_cache
from cqlora.errors import CqloraError, DataError
from cqlora.frozen import describe_config, load_frozen
from cqlora.lineage import describe_lineage
from cqlora.model.adapters import adapter_state, attach_adapter, save_adapter
from cqlora.model.fusion import fuse_blocks
from cqlora.model.load import checkpoint_activations, choose_compute_dtype, open_model
from cqlora.model.objective import Objective
from cqlora.model.pissa import convert_to_lora, initialise_pissa
from cqlora.model.placement import place, unwrap
from cqlora.optimization import build_optimizer
from cqlora.processes import record_failure
from cqlora.progress import StageDisplay, show_log
from cqlora.random_base import open_base
from cqlora.signals import die_with
from cqlora.snapshot import describe_identity
from cqlora.system.refusals import told_as_sentence
from cqlora.tracking import Record, open_record
from cqlora.trainer import Trainer
from cqlora.worker import Worker, seed_everything, start_worker


def train(config: RunConfig, output_dir: Path) -> Path:
    """Train an adapter; return the run's folder, which ends with metrics.jsonl, checkpoints/ and adapter/.

    Workers that were started each on their own may each have named another folder: rank 0's is the run's.
    """
    with start_worker(config.hardware) as worker:
        folder = agree_on_folder(output_dir, worker)
        with open_record(config, folder, worker.is_main) as record:
            train_as(worker, config, folder, record)
    return folder


def train_as(worker: Worker, config: RunConfig, output_dir: Path, record: Record) -> None:
    """One worker's part."""
    seed_everything(config.seed)
    base = worker.first(lambda: open_base(config.model))
    cache = open_cache(config, base, worker)
    lineage = describe_lineage(config.stage.init_adapter) | {"adapter": describe_adapter(config)}

    dtype = choose_compute_dtype(worker.device, config.hardware.precision)
    frozen, fill = open_model(base, config.model, config.hardware, worker.device, dtype)
    model = attach_adapter(frozen, base, config.lora, config.stage.embeddings, config.stage.init_adapter)
    if config.lora.method is AdapterMethod.pissa:
        iterations = config.lora.pissa_iterations
        worker.first(lambda: initialise_pissa(model, base, output_dir, iterations, config.seed))
    checkpoint_activations(model, config.hardware.activation_checkpointing)
    fused = fuse_blocks(model)
    module = place(Objective(model, dtype, autocast=not fused), config.hardware, worker.device, fill)
    optimizer = build_optimizer(module, config.stage, worker.device)

    trainer = Trainer(config, worker, module, optimizer, cache, record, output_dir)
    seed_everything(config.seed, worker.rank)
    trainer.resume(worker.first(lambda: identify(config, base, cache, trainer.total_steps)))
    trainer.fit()
    save_final(config, trainer, base, lineage, output_dir)


def describe_adapter(config: RunConfig) -> dict[str, Any]:
    """The settled values that an adapter was trained with, for its card."""
    lora = describe_config(config)["lora"]
    names = ("method", "rank", "alpha", "dropout", "target_modules")
    return {name: lora[name] for name in names} | {"embeddings": config.stage.embeddings.name}


def agree_on_folder(output_dir: Path, worker: Worker) -> Path:
    """Rank 0's folder; another that this worker's own start has made and not used is removed."""
    own = output_dir.resolve()
    folder: Path = worker.broadcast(own)
    if own != folder and own.is_dir() and not any(own.iterdir()):
        own.rmdir()
    return folder


def open_cache(config: RunConfig, base: Base, worker: Worker) -> TokenCache:
    """The run's token cache, built by rank 0 where it is missing, and read whole once on each node to verify it.

    Raises:
        DataError: the cache holds nothing to train on.
    """
    with StageDisplay(worker.is_main) as display:
        cache = worker.first(lambda: prepare_cache(config, base, display.show, verify=worker.leads_node))
    if not len(cache.splits["train"]):
        raise DataError(f"data={config.data.name} holds no document to train on; look at {cache.folder}/summary.json.")
    return cache


def identify(config: RunConfig, base: Base, cache: TokenCache, total_steps: int) -> dict[str, Any]:
    """What a resumed run must share with the one that was stopped."""
    fingerprints = {
        "token_cache": cache.fingerprint,
        "tokenizer": fingerprint_tokenizer(base.path),
        "base": fingerprint_weights(base.path),
    }
    if config.stage.init_adapter:
        fingerprints["init_adapter"] = hash_file(Path(config.stage.init_adapter, "adapter_model.safetensors"))
    return describe_identity(config, fingerprints, total_steps)


def save_final(config: RunConfig, trainer: Trainer, base: Base, lineage: dict[str, Any], output_dir: Path) -> None:
    """Write adapter/; every worker takes part in gathering it, rank 0 writes."""
    model = unwrap(trainer.module).model
    state, rank_factor = adapter_state(model), 1
    if config.lora.method is AdapterMethod.pissa:
        state, rank_factor = convert_to_lora(model, state, output_dir), 2
    if trainer.worker.is_main:
        prompt = getattr(config.stage, "system_prompt", "")
        save_adapter(model, output_dir / "adapter", base, state, rank_factor, config.stage.name, lineage, prompt)
    trainer.worker.wait()


def main() -> None:
    """A worker: `python -m cqlora.train RUN_YAML`, started by `cqlora.launch` (which adds its own id) or torchrun."""
    run_file = Path(sys.argv[1])
    if sys.argv[2:]:
        die_with(int(sys.argv[2]))
    sys.excepthook = tell_failure
    show_log()
    try:
        with told_as_sentence():
            train(load_frozen(run_file), run_file.parent)
    except CqloraError as error:
        if not record_failure(str(error)):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def tell_failure(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An error that nobody foresaw, with its traceback, to whoever started this worker."""
    told = "".join(traceback.format_exception(kind, error, trace))
    if not record_failure(f"worker {os.environ.get('RANK', '0')} failed.\n{told}"):
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    main()
