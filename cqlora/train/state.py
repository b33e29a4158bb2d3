"""What a checkpoint holds and how a run is put back to it, bit by bit."""

import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from cqlora.config.choices import Kernels, Schedule, Strategy
from cqlora.config.run_yaml import describe_config, flatten
from cqlora.config.schema import SETTLED_KEYS, ModelConfig, RunConfig
from cqlora.errors import CheckpointError, TrainingError
from cqlora.model.placement import local_part
from cqlora.system.companions import ACCEPT_IN_RUN, refuse_changed
from cqlora.system.metrics import measure_metrics
from cqlora.train.checkpoint import CheckpointStore, read_manifest
from cqlora.train.distributed import Worker, generator_states, restore_generators
from cqlora.train.optimizer import load_optimizer

_STATE_FILE = "state.json"
COMPANIONS_KEY, METRICS_KEY = "companions", "metrics"
"""Under which a checkpoint tells of the base's companions, in its identity, and of the run's metrics.jsonl so far."""

ONLY_CHATML = {"stage.template": "chatml", "stage.thinking": "train"}
"""What instruction tuning was while there was no choice of it."""

_FINGERPRINT = re.compile(r"[0-9a-f]{32,}")
_FREE_TO_CHANGE = {
    "tracking",
    "sweep",
    "hardware.name",
    "hardware.gpu_memory_gib",
    "hardware.host_memory_gib",
    "hardware.allow_misfit",
    "hardware.peak_tflops",
    "hardware.memory_gb_per_s",
    "hardware.link_gb_per_s",
    "hardware.network_gb_per_s",
    "hardware.global_batch_size",
    "model.accept_changed",
    "model.biases",
    "model.head_norms",
    "model.path",
    "model.name",
    "data",
    "stage.max_steps",
    "stage.epochs",
    "stage.eval_every_steps",
    "stage.eval_tokens",
    "stage.eval_characters",
    "stage.eval_probe",
    "stage.eval_generations",
    "stage.eval_generation_tokens",
    "stage.max_forgetting",
    "stage.checkpoint_every_steps",
    "stage.keep_last",
    "stage.resume",
    "stage.init_adapter",
    "stage.max_bad_steps",
}
"""Keys that change no result of a step, or whose effect a fingerprint or total_steps covers."""


@dataclass(slots=True)
class Counters:
    """How far a run has come, between two steps."""

    step: int = 0
    """Optimizer steps done, skipped ones among them."""
    tokens: int = 0
    """Tokens seen."""
    bad_steps: int = 0
    """Non-finite steps in a row."""
    applied: int = 0
    """Steps that were finite, and so moved the parameters."""


def describe_identity(config: RunConfig, fingerprints: dict[str, Any], total_steps: int) -> dict[str, Any]:
    """All that must be the same for a resumed run to be the run that was stopped, under dotted keys."""
    identity: dict[str, Any] = {**fingerprints, "world_size": config.hardware.world_size}
    if config.stage.schedule is not Schedule.constant:
        identity["total_steps"] = total_steps
    values = flatten(describe_config(config))
    return identity | {
        key: value for key, value in values.items() if not {key, key.partition(".")[0]} & _FREE_TO_CHANGE
    }


def require_same_run(identity: dict[str, Any], folder: Path, model: ModelConfig) -> None:
    """Refuse a checkpoint of a run with another identity, or with other files beside the base's weights.

    Raises:
        CheckpointError: what differs would change the result.
        ModelError: a companion of the base was changed and `model` does not accept it.
    """
    stored = read_state(folder)["identity"]
    identity, companions = {**identity}, stored.pop(COMPANIONS_KEY, {})
    identity.pop(COMPANIONS_KEY, None)
    refuse_changed(Path(model.path), companions, f"when {folder} was written", ACCEPT_IN_RUN, model.accept_changed)
    if identity.get("stage.name") == "sft":
        stored = ONLY_CHATML | stored
    # An older cqlora left `auto` to its workers; `cqlora.launch.settle` has compared what it came to there.
    stored |= {key: identity.get(key) for key in SETTLED_KEYS if stored.get(key) == "auto"}
    stored.setdefault("hardware.kernels", Kernels.plain.name)
    different = [key for key in sorted(identity.keys() | stored.keys()) if identity.get(key) != stored.get(key)]
    if "stage.name" in different:
        was, asked = stored.get("stage.name"), identity.get("stage.name")
        raise CheckpointError(
            f"{folder} is of a run of stage={was}, and this is stage={asked}; give another folder with "
            "hydra.run.dir=FOLDER."
        )
    if different:
        differences = "; ".join(
            f"{key} was {shown(stored.get(key))} and is {shown(identity.get(key))}" for key in different
        )
        raise CheckpointError(
            f"{folder} cannot be resumed, since the result would differ: {differences}; give the values that it was "
            "started with, or another folder with hydra.run.dir=FOLDER."
        )


def shown(value: Any) -> str:
    """A value as a sentence names it; a fingerprint by its beginning."""
    return repr(f"{value[:12]}…" if isinstance(value, str) and _FINGERPRINT.fullmatch(value) else value)


def save_state(
    store: CheckpointStore,
    worker: Worker,
    strategy: Strategy,
    counters: Counters,
    identity: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Path:
    """Commit a checkpoint of all workers' state; every worker calls it, each writes what it alone holds.

    Raises:
        TrainingError: a trained value is not finite, so nothing is written.
        CheckpointError: the disk refused.
    """
    parameters = {name: local_part(p) for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        if not torch.isfinite(parameter).all():
            raise TrainingError(f"{name} is not finite after step {counters.step}; the last checkpoint stands.")
    if worker.is_main:
        store.stage(counters.step)
    worker.wait()
    if worker.is_main or strategy is Strategy.fsdp:
        held = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
        store.write(counters.step, _file("trainable", worker, "safetensors"), save(held))
        states = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        store.write(counters.step, _file("optimizer", worker, "pt"), _serialise(states))
    store.write(counters.step, _file("random", worker, "pt"), _serialise(generator_states(worker.gpus)))
    worker.wait()
    if worker.is_main:
        state = {**asdict(counters), "identity": identity, METRICS_KEY: measure_metrics(store.root.parent)}
        store.write(counters.step, _STATE_FILE, json.dumps(state, indent=2).encode())
        store.commit(counters.step)
    worker.wait()
    return store.root


def restore_state(
    folder: Path,
    worker: Worker,
    strategy: Strategy,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Counters:
    """Put model, optimizer and generators back to a verified checkpoint; return where it stands."""
    owner = worker if strategy is Strategy.fsdp else Worker(0, 1, worker.device)
    _require_named(folder, _file("trainable", owner, "safetensors"), _file("optimizer", owner, "pt"))
    _require_named(folder, _file("random", worker, "pt"))
    stored = load_file(folder / _file("trainable", owner, "safetensors"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                local_part(parameter).copy_(stored[name])
    states = torch.load(folder / _file("optimizer", owner, "pt"), map_location="cpu", weights_only=True)
    load_optimizer(optimizer, states["optimizer"])
    scaler.load_state_dict(states["scaler"])
    random = torch.load(folder / _file("random", worker, "pt"), map_location="cpu", weights_only=True)
    restore_generators(random, worker.gpus)
    state = read_state(folder)
    return Counters(
        step=state["step"],
        tokens=state["tokens"],
        bad_steps=state["bad_steps"],
        applied=state.get("applied", state["step"] - state["bad_steps"]),
    )


def _require_named(folder: Path, *names: str) -> None:
    """Raise CheckpointError for a file that the manifest does not name, since nobody has verified it."""
    named = read_manifest(folder)
    for name in names:
        if name not in named:
            raise CheckpointError(
                f"{folder} is damaged: its manifest.json does not name {name}; move it away to use another."
            )


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint."""
    _require_named(folder, _STATE_FILE)
    state: dict[str, Any] = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
    return state


def _file(name: str, worker: Worker, suffix: str) -> str:
    return f"{name}-rank{worker.rank}.{suffix}"


def _serialise(values: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(values, stream)
    return stream.getvalue()
