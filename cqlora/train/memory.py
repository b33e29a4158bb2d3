"""A GPU that is full, described as what the run took, what the plan had said, and what to change."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from cqlora.config.choices import Checkpointing, Strategy
from cqlora.config.schema import RunConfig
from cqlora.errors import TrainingError
from cqlora.plan.estimate import GIB
from cqlora.plan.memory import plan_memory


@contextmanager
def described_when_full(config: RunConfig, gpus: Sequence[torch.device]) -> Iterator[None]:
    """Turn the allocator's error into one sentence; the last checkpoint stands.

    Raises:
        TrainingError: the GPU had no room for what the block asked for.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak_gib = max((torch.cuda.max_memory_reserved(gpu) for gpu in gpus), default=0) / GIB
        raise TrainingError(describe_full(config, peak_gib, str(error))) from error


def describe_full(config: RunConfig, peak_gib: float, reason: str) -> str:
    """The sentence: memory taken, memory planned, and the changes that this configuration leaves."""
    planned_gib = plan_memory(config).step / GIB
    asked = reason.partition("Tried to allocate ")[2].partition(". ")[0]
    return (
        f"the GPU is full: {peak_gib:.1f} GiB were taken{f' when {asked} more was asked for' if asked else ''}, and "
        f"`cqlora plan` counts {planned_gib:.1f} of {config.hardware.gpu_memory_gib:.1f} GiB; the last checkpoint "
        f"stands: train in another folder with {', or '.join(list_changes(config))}."
    )


def list_changes(config: RunConfig) -> list[str]:
    """What takes less memory, what changes the result least first."""
    hardware, stage = config.hardware, config.stage
    changes = []
    if hardware.micro_batch_size > 1:
        changes.append(f"hardware.micro_batch_size={hardware.micro_batch_size // 2}")
    if hardware.activation_checkpointing is Checkpointing.none:
        changes.append("hardware.activation_checkpointing=full")
    if hardware.world_size > 1 and hardware.strategy is Strategy.ddp:
        changes.append("hardware.strategy=fsdp")
    return [*changes, f"stage.sequence_length={stage.sequence_length // 2}", "a GPU with more memory"]
