"""One worker among the workers of a run: its rank, its device, what it says to the others."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState

from cqlora.choices import Device
from cqlora.config import HardwareConfig

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Worker:
    """This process's place in the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element by element over all workers; `values` is float64 on the host."""
        if self.world_size == 1:
            return values
        summed = values.to(self.device)
        dist.all_reduce(summed)
        return summed.cpu()

    def wait(self) -> None:
        """Go on when every worker is here."""
        if self.world_size > 1:
            dist.barrier()

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives, called by rank 0 alone before the others call it: it builds, they open."""
        made = make() if self.is_main else None
        self.wait()
        return make() if made is None else made

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every worker."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def start_worker(hardware: HardwareConfig) -> Iterator[Worker]:
    """Join the other workers, if torchrun or srun started any, and leave them at the end."""
    on_cpu = hardware.device is Device.cpu
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // hardware.processes_per_node))
    state = PartialState(cpu=on_cpu)
    try:
        yield Worker(rank=state.process_index, world_size=state.num_processes, device=state.device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        PartialState._reset_state()


def seed_everything(seed: int, rank: int) -> None:
    """Seed every generator; ranks draw different dropout masks."""
    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Every random generator's state, as plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Put every random generator back to where `generator_states` found it."""
    random.setstate(states["python"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
