"""One worker among the workers of a run: its rank, its device, what it exchanges with the others."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cqlora.config.choices import Device, Strategy
from cqlora.config.schema import HardwareConfig
from cqlora.system.cuda import require_cuda, require_kernels
from cqlora.system.handover import STORE_SOCKET

T = TypeVar("T")

PATIENCE = timedelta(days=2)
"""How long workers wait for the first one, which may be building a large token cache."""


@dataclass(frozen=True, slots=True)
class Worker:
    """This process's place in the run."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """The process group for exchanges on the host, with a long time limit; None for a worker that is alone."""
    gpus: tuple[torch.device, ...] = ()
    """All that this worker computes on: its own, or under `layers` every one of its machine."""

    @property
    def is_main(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0

    @property
    def leads_node(self) -> bool:
        """Whether this worker does what is done once on each machine."""
        return self.is_main or os.environ.get("LOCAL_RANK") == "0"

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element by element over all workers; `values` is float64 on the host."""
        if self.world_size == 1:
            return values
        summed = values.clone()
        dist.all_reduce(summed, group=self.group)
        return summed

    def wait(self) -> None:
        """Go on when every worker is here."""
        if self.world_size > 1:
            dist.barrier(group=self.group)

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns: rank 0 calls it first, which may build something, then the others, which open it."""
        if self.is_main:
            made = make()
            self.wait()
            return made
        self.wait()
        return make()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every worker."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]


@contextmanager
def start_worker(hardware: HardwareConfig) -> Iterator[Worker]:
    """Join the other workers, if the environment says that there are any, and leave them at the end.

    A worker that fails keeps its connections until it has reported its error and exits, so that no other worker
    fails of the lost connection first.
    """
    on_cpu = hardware.device is Device.cpu
    if not on_cpu:
        require_cuda("hardware.device=cuda", instead="hardware=cpu")
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // hardware.processes_per_node))
    group = join_workers(on_cpu) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    state = PartialState(cpu=on_cpu)
    gpus = () if on_cpu else list_gpus(hardware, state.device)
    for gpu in gpus:
        require_kernels(gpu, instead="hardware=cpu")
    yield Worker(state.process_index, state.num_processes, state.device, group, gpus)
    if group is not None:
        dist.destroy_process_group()
    PartialState._reset_state()


def list_gpus(hardware: HardwareConfig, own: torch.device) -> tuple[torch.device, ...]:
    """What a worker computes on."""
    if hardware.strategy is not Strategy.layers:
        return (own,)
    return tuple(torch.device("cuda", gpu) for gpu in range(max(1, hardware.gpus_per_node)))


def join_workers(on_cpu: bool) -> dist.ProcessGroup | None:
    """Meet the other workers where the environment says (torchrun's variables); return the patient group.

    Tensors on the host go by gloo and those on GPUs by NCCL, whose patience is too short for what one worker
    does while the others wait.
    """
    backend, own = "gloo", None
    if not on_cpu:
        backend = "cpu:gloo,cuda:nccl"
        # Modulo, since srun may show each task the one GPU that is its own.
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(own)
    if STORE_SOCKET in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=open_store(), rank=rank, world_size=world_size, device_id=own)
    else:
        dist.init_process_group(backend, device_id=own)
    group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=PATIENCE)
    return group


def open_store() -> TCPStore:
    """Where workers of `launch.processes` find each other: rank 0 listens on the socket that it inherits."""
    rank = int(os.environ["RANK"])
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=rank == 0,
        master_listen_fd=int(os.environ[STORE_SOCKET]) if rank == 0 else None,
    )


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed every generator: alike on all workers where they make the same model, by rank for dropout masks."""
    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def generator_states(gpus: Sequence[torch.device]) -> dict[str, Any]:
    """Every random generator's state, as plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if gpus:
        states["cuda"] = [torch.cuda.get_rng_state(gpu) for gpu in gpus]
    return states


def restore_generators(states: dict[str, Any], gpus: Sequence[torch.device]) -> None:
    """Put every random generator back to where `generator_states` found it."""
    random.setstate(states["python"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    for gpu, state in zip(gpus, states.get("cuda", ()), strict=True):
        torch.cuda.set_rng_state(state, gpu)
