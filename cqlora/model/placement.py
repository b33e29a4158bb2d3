"""Lay a model out over workers: alone, replicated by DDP, or sharded by FSDP2; torch's own, and checked."""

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cqlora.choices import Strategy
from cqlora.config import HardwareConfig
from cqlora.errors import ModelError
from cqlora.model.load import find_decoder
from cqlora.model.objective import Objective


def place(objective: Objective, hardware: HardwareConfig, device: torch.device) -> nn.Module:
    """The module to call in a training step; its gradients are means over the workers.

    Raises:
        ModelError: sharding left a worker with more than its share.
    """
    if hardware.strategy is Strategy.ddp and hardware.world_size > 1:
        return DistributedDataParallel(objective, device_ids=[device] if device.type == "cuda" else None)
    if hardware.strategy is Strategy.fsdp:
        return shard(objective, hardware, device)
    return objective


def shard(objective: Objective, hardware: HardwareConfig, device: torch.device) -> nn.Module:
    """FSDP2 over all workers, one unit per block and one for the rest."""
    whole = sum(p.numel() * p.element_size() for p in objective.parameters())
    mesh = init_device_mesh(device.type, (hardware.world_size,))
    offload = CPUOffloadPolicy() if hardware.cpu_offload else OffloadPolicy()
    for block in cast(nn.ModuleList, find_decoder(objective.model).layers):
        fully_shard(block, mesh=mesh, offload_policy=offload)
    fully_shard(objective, mesh=mesh, offload_policy=offload)
    held = sum(local_part(p).numel() * p.element_size() for p in objective.parameters())
    # Rows that do not divide are padded on the last rank; anything beyond a tenth stayed whole.
    if held > 1.1 * whole / hardware.world_size:
        raise ModelError(
            f"hardware.strategy=fsdp left {held / whole:.0%} of the weights on one of {hardware.world_size} workers; "
            "use hardware.strategy=ddp or model.quantization=nf4."
        )
    return objective


def accumulate_without_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Within it, backward passes leave gradients on their worker; the last pass outside it averages them."""
    if isinstance(module, DistributedDataParallel):
        context: AbstractContextManager[None] = module.no_sync()
        return context
    return nullcontext()


def unwrap(module: nn.Module) -> Objective:
    """The objective inside what `place` returned."""
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    assert isinstance(inner, Objective), type(inner)
    return inner


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this worker holds of a tensor: its shard of a sharded one, else all."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
