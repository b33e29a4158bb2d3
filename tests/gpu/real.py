"""What the tests that need real numbers run on, and what they tell at their end (`make test-gpu`).

CQLORA_GPU_TESTS=dry puts the processor in a GPU's place, so that no line of theirs is first run on one: figures are
then of the processor, and what only a GPU can show is not asserted.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cqlora.system.machine import read_driver_version
from cqlora.system.metrics import read_metrics
from tests.runs import finish_run, typed_run

DRY = os.environ.get("CQLORA_GPU_TESTS") == "dry"
DEVICE = torch.device("cpu") if DRY else torch.device("cuda", 0)
PACKAGES = ("cqlora", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "flash-attn", "triton")
RUN = ("stage=pretrain", "lora.dropout=0", "stage.schedule=constant", "stage.max_steps=4", "stage.learning_rate=1e-3")
ON_GPU = (f"hardware.device={DEVICE.type}",)


def why_no_gpu(needed: int = 1) -> str | None:
    """What keeps these tests from running; None where they can. Dry ones have two workers on the processor."""
    found = 2 if DRY else torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found >= needed:
        return None
    return f"needs {needed} GPU{'s' * (needed > 1)} that torch can use and there are {found}"


def train(workspace: Path, folder: Path, *overrides: str) -> list[float]:
    """A small run to its end; the losses of its steps, then of its evaluations."""
    assert finish_run(typed_run(workspace, *RUN, *overrides, folder=folder), folder) == 0, read_end(folder)
    return read_losses(folder)


def read_losses(folder: Path) -> list[float]:
    """Losses of a run's steps, then of its evaluations."""
    rows = read_metrics(folder)
    return [row["loss"] for kind in ("train", "eval") for row in rows if row["kind"] == kind]


def read_end(folder: Path) -> str:
    """What a run that failed said last."""
    return "\n".join(file.read_text()[-2000:] for file in sorted(folder.glob("stderr*.txt")))


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two runs' losses."""
    assert len(ours) == len(theirs) > 0
    return max(abs(one - other) / other for one, other in zip(ours, theirs, strict=True))


def synchronize() -> None:
    """Wait for all that was asked of the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def peak_bytes() -> tuple[int, int]:
    """Most bytes in tensors, and most that the allocator had reserved, since the peak was reset."""
    return (0, 0) if DRY else (torch.cuda.max_memory_allocated(DEVICE), torch.cuda.max_memory_reserved(DEVICE))


def describe(figures: dict[str, str], outcomes: dict[str, list[str]]) -> str:
    """The text to paste into an issue: the machine, each figure, and what failed or was skipped."""
    names = (
        ["the processor (dry)"] if DRY else [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    )
    lines = [
        "GPUs: " + ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)),
        f"driver {read_driver_version() or 'none'}, CUDA {torch.version.cuda or 'none'}, "
        + ", ".join(f"{name} {read_version(name)}" for name in PACKAGES),
        *(f"{name}: {figure}" for name, figure in figures.items()),
        *(f"{outcome}: {test}" for outcome, tests in outcomes.items() for test in tests),
    ]
    return "\n".join(lines)


def read_version(package: str) -> str:
    """A package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
