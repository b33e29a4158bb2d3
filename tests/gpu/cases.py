"""What is asked of `server.py`: programs on GPUs that are not there, and what is told of each, as JSON has it."""

import functools
import gc
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import cqlora.base
import cqlora.train.trainer
from cqlora.config.schema import RunConfig
from cqlora.engine import LlamaEngine
from cqlora.model.fused.mlp import FusedMLP
from cqlora.model.throughput import measure_matmul_flops
from cqlora.plan.memory import plan_memory
from cqlora.system.metrics import read_metrics
from cqlora.train import distributed, run
from cqlora.train.trainer import Trainer
from tests.gpu import count_kernels as counting
from tests.gpu.fake_gpu import Card
from tests.gpu.fake_step import fake_gpus, join_nobody, take_place
from tests.gpu.meter import Meter
from tests.gpu.step import build_module, compose_hollow, end_step


def count_kernels(*overrides: str) -> dict[str, Any]:
    """Kernels of a micro batch of 7B, as `count_kernels.py` has them."""
    return vars(counting.count_kernels(*overrides))


def measure_step(*overrides: str) -> dict[str, Any]:
    """Bytes of tensors on a worker's fullest GPU, loading and in a step, beside the plan's."""
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        config = compose_hollow(Path(folder), *overrides)
        worker = plan_memory(config).worker
        with fake_gpus(card_of(config), meter), counted_mlps() as mlps:
            if config.hardware.world_size > 1:
                take_place(config.hardware.world_size)
                join_nobody()
            module, optimizer = build_module(config)
            loading = max(meter.peak.values())
            meter.restart()
            end_step(config, module, optimizer)
            return {
                "measured": max(meter.peak.values()),
                "planned": worker.allocated,
                "moment": worker.moment,
                "held": max(meter.alive.values()),
                "planned_held": worker.held,
                "loading": loading,
                "planned_loading": worker.loading_allocated,
                "types": sorted({dtype for _, dtype in meter.products}),
                "waits": told(meter),
                "gpus": sum(alive > 0 for alive in meter.alive.values()),
                "fused_mlps": len(set(mlps)),
            }


def train_whole(*overrides: str, capability: tuple[int, int] = (9, 0)) -> dict[str, Any]:
    """A run from its first check to its adapter, stopped after two of its three steps and resumed."""
    meter, said = Meter(), io.StringIO()
    cqlora.train.trainer.logger.setLevel(logging.INFO)
    cqlora.train.trainer.logger.addHandler(logging.StreamHandler(said))
    with tempfile.TemporaryDirectory() as folder, watched(meter):
        cache = f"data.cache_dir={folder}/cache"
        config = compose_hollow(Path(folder, "base"), cache, *SHORT_RUN, *overrides)
        card = replace(card_of(config), capability=tuple(capability))
        run_folder = Path(folder, "run")
        if config.hardware.world_size > 1:
            take_place(config.hardware.world_size)
        with fake_gpus(card, meter):
            for steps in (2, 3):
                gc.collect()
                run.train(replace(config, stage=replace(config.stage, max_steps=steps)), run_folder)
        rows = read_metrics(run_folder)
        adapter = load_file(run_folder / "adapter" / "adapter_model.safetensors")
        return {
            "events": [row["event"] for row in rows if row["kind"] == "event"],
            "said": said.getvalue().splitlines(),
            "steps": [row["step"] for row in rows if row["kind"] == "train"],
            "peak_memory_gib": [row["peak_memory_gib"] for row in rows if row["kind"] == "train"],
            "planted_gib": PLANTED_BYTES / 2**30,
            "files": sorted(file.name for file in (run_folder / "checkpoints" / "step-00000003").iterdir()),
            "adapter_types": sorted({str(tensor.dtype) for tensor in adapter.values()}),
            "adapter_numbers": sum(tensor.numel() for tensor in adapter.values()),
            "types": sorted({dtype for _, dtype in meter.products}),
            "waits": told(meter),
        }


def open_engine(quantization: str, capability: tuple[int, int]) -> dict[str, Any]:
    """The engine on a GPU of a capability: how it holds the matrices, and what quantised them."""
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        compose_hollow(Path(folder), "model=llama_7b", "hardware=1xa100", "model.num_hidden_layers=2")
        with fake_gpus(Card(capability=tuple(capability)), meter) as gpu:
            engine = LlamaEngine(folder, "", use_lora=False, quantization=quantization, device="cuda")
        quantise = "bitsandbytes.quantize_4bit.default"
        return {"form": engine.form, "on_gpu": meter.kernels[quantise], "on_host": gpu.on_host[quantise]}


def try_the_meter() -> dict[str, Any]:
    """Each kind of wait once, what is refused, the types of a product that mixes them, the bytes of a small tensor."""
    meter = Meter()
    with fake_gpus(Card(), meter):
        there, here = torch.ones(4, 4, device="cuda"), torch.ones(4, 4)
        alive = meter.alive[0]
        there.sum().item(), there.cpu(), here.copy_(there), here.to("cuda"), torch.cuda.synchronize()
        here.pin_memory().to("cuda", non_blocking=True)
        torch.mm(there, there.bfloat16())
        refused = fails(there.nonzero), fails(lambda x: x[x > 0], there), fails(torch.add, there, here)
        del there
        return {
            "waits": sorted([kind, times] for (_, _, kind), times in meter.waits.items()),
            "refused": refused,
            "types": [types for _, types in meter.products],
            "alive": [alive, meter.alive[0]],
        }


def fails(call: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a call is refused."""
    try:
        call(*arguments)
    except Exception:  # noqa: BLE001 - whatever torch raises
        return True
    return False


PLANTED_BYTES = 2**36
"""Allocated and freed before a run's first step."""
SHORT_RUN = (
    "tracking=none",
    "stage.checkpoint_every_steps=2",
    "stage.eval_tokens=300",
    "~data.sources.sample_en",
    "hardware.micro_batch_size=1",
    "model.num_hidden_layers=2",
    "stage.schedule=constant",
)


def card_of(config: RunConfig) -> Card:
    """The GPUs of a configuration's node."""
    hardware = config.hardware
    return Card(gpus=max(hardware.processes_per_node, hardware.gpus_per_node), memory_gib=hardware.gpu_memory_gib)


def told(meter: Meter) -> list[list[Any]]:
    """Waits as phase, place and kind, with how often each came."""
    return [[*wait, times] for wait, times in sorted(meter.waits.items())]


@contextmanager
def counted_mlps() -> Iterator[list[int]]:
    """The fused feed-forward blocks that ran, by identity."""
    forward, ran = FusedMLP.forward, []

    def note(mlp: FusedMLP, x: torch.Tensor) -> torch.Tensor:
        ran.append(id(mlp))
        return forward(mlp, x)

    FusedMLP.forward = note  # type: ignore[method-assign]
    yield ran
    FusedMLP.forward = forward  # type: ignore[method-assign]


@contextmanager
def watched(meter: Meter) -> Iterator[None]:
    """Waits told apart by what a trainer is at; its workers join no group but the fake one, and hash no holes."""

    def enter(owner: Any, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if name == "fit":
                torch.empty(PLANTED_BYTES, dtype=torch.uint8, device="cuda")
            meter.phase = phase
            return original(*arguments, **options)

        setattr(owner, name, call)

    enter(Trainer, "fit", "before the first step")
    enter(Trainer, "train_step", "step")
    enter(cqlora.train.trainer, "build_batch", "micro batch")
    enter(Trainer, "_sum_by_source", "step")
    enter(Trainer, "evaluate", "evaluation")
    enter(Trainer, "commit", "checkpoint")
    enter(run, "save_final", "end")
    # Of no use to runs that are no longer than that.
    cqlora.train.trainer.measure_matmul_flops = functools.partial(measure_matmul_flops, seconds=0.01)
    cqlora.base.hash_tensors = lambda tensors: {tensor.name: tensor.name for tensor in tensors}
    distributed.join_workers = join_nobody
    yield
