"""What the tests that need real numbers run on, and what they tell at their end (`make test-gpu`).

Every run is a program of its own, started as a user's command starts its workers, and never a fork: whoever imports
bitsandbytes has asked the GPUs what they can do, and CUDA cannot be used in a process that is forked afterwards.
CQLORA_GPU_TESTS=dry puts the processor in a GPU's place, so that no line of theirs is first run on one: figures are
then of the processor, and what only a GPU can show is not asserted.
"""

import gc
import os
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cqlora.config.run_yaml import write_run_yaml
from cqlora.launch.processes import run_workers, worker_command
from cqlora.system.machine import BFLOAT16_CAPABILITY, read_driver_version
from cqlora.system.metrics import read_metrics
from tests.conftest import HANG_SECONDS
from tests.runs import free_port, typed_run

ASKED = os.environ.get("CQLORA_GPU_TESTS", "")
DRY = ASKED == "dry"
DEVICE = torch.device("cpu") if DRY else torch.device("cuda", 0)
PACKAGES = ("cqlora", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "flash-attn", "triton")
RUN = ("stage=pretrain", "lora.dropout=0", "stage.schedule=constant", "stage.max_steps=4", "stage.learning_rate=1e-3")
ON_GPU = (f"hardware.device={DEVICE.type}",)
DRY_GPUS = 4
"""Workers on the processor in the place of as many GPUs."""


@cache
def why_no_gpu(needed: int = 1) -> str | None:
    """What keeps these tests from running; None where they can."""
    if not ASKED:
        return "needs a GPU, and `make test-gpu`, without which tests see none"
    found = DRY_GPUS if DRY else torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found >= needed:
        return None
    return (
        f"needs {needed} GPU{'s' * (needed > 1)} that torch can use and there {'are' if found != 1 else 'is'} {found}"
    )


def why_no_bfloat16() -> str | None:
    """What keeps kernels for bfloat16 from running on the first GPU; None where they can."""
    if DRY or why_no_gpu() is not None or torch.cuda.get_device_capability(DEVICE) >= BFLOAT16_CAPABILITY:
        return None
    return f"needs a GPU from Ampere on and this is {torch.cuda.get_device_name(DEVICE)}"


def train(workspace: Path, folder: Path, *overrides: str) -> list[float]:
    """A small run to its end, with the workers of one node; the losses of its steps, then of its evaluations."""
    config = typed_run(workspace, *RUN, *overrides, folder=folder)
    run_workers(write_run_yaml(config, folder), config.hardware)
    return read_losses(folder)


def train_on_nodes(workspace: Path, folder: Path, *overrides: str) -> list[float]:
    """As `train`, with workers that are taken for those of several nodes, started as torchrun does."""
    config = typed_run(workspace, *RUN, *overrides, folder=folder)
    command, workers = worker_command(write_run_yaml(config, folder)), config.hardware.world_size
    shared = {"WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **{key: str(value) for key, value in (shared | {"RANK": n, "LOCAL_RANK": n}).items()}},
        )
        for n in range(workers)
    ]
    try:
        codes = [worker.wait(HANG_SECONDS) for worker in started]
    finally:
        for worker in started:
            worker.kill()
    assert codes == [0] * workers
    return read_losses(folder)


def read_losses(folder: Path) -> list[float]:
    """Losses of a run's steps, then of its evaluations."""
    rows = read_metrics(folder)
    return [row["loss"] for kind in ("train", "eval") for row in rows if row["kind"] == kind]


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two runs' losses."""
    assert len(ours) == len(theirs) > 0
    return max(abs(one - other) / other for one, other in zip(ours, theirs, strict=True))


def free_memory() -> None:
    """Give back what the allocator keeps of earlier work, and let the peak begin."""
    if DEVICE.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)


def synchronize() -> None:
    """Wait for all that was asked of the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def peak_bytes() -> tuple[int, int]:
    """Most bytes in tensors, and most that the allocator had reserved, since the peak was reset."""
    return (0, 0) if DRY else (torch.cuda.max_memory_allocated(DEVICE), torch.cuda.max_memory_reserved(DEVICE))


def describe(figures: dict[str, str], outcomes: dict[str, list[str]], seconds: float) -> str:
    """The text to paste into an issue: the machine, each figure, what failed, how, or was skipped, and the time."""
    names = (
        ["the processor (dry)"] if DRY else [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    )
    lines = [
        "GPUs: " + ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)),
        f"driver {read_driver_version() or 'none'}, CUDA {torch.version.cuda or 'none'}, "
        + ", ".join(f"{name} {read_version(name)}" for name in PACKAGES),
        *(f"{name}: {figure}" for name, figure in figures.items()),
        *(f"{outcome}: {test}" for outcome, tests in outcomes.items() for test in tests),
        f"all of it took {seconds / 60:.1f} minutes",
    ]
    return "\n".join(lines)


def read_version(package: str) -> str:
    """A package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
