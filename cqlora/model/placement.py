"""Lay a model out over workers: alone, replicated by DDP, or sharded by FSDP2; torch's own, and checked."""

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cqlora.config.choices import Strategy
from cqlora.config.schema import HardwareConfig
from cqlora.errors import ModelError
from cqlora.model.load import find_decoder
from cqlora.model.objective import Objective
from cqlora.model.sharded_load import Fill


def place(objective: Objective, hardware: HardwareConfig, device: torch.device, fill: Fill) -> nn.Module:
    """The module to call in a training step; its gradients are means over the workers.

    `fill` reads a block's weights where they were left for this moment.

    Raises:
        ModelError: sharding left a worker with more than its share.
    """
    if hardware.strategy is Strategy.ddp and hardware.world_size > 1:
        # Buffers are rotary angles, the same on every worker: sending them before each forward would gain nothing.
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(objective, device_ids=devices, broadcast_buffers=False)
    if hardware.strategy is Strategy.fsdp:
        return shard(objective, hardware, device, fill)
    return objective


def shard(objective: Objective, hardware: HardwareConfig, device: torch.device, fill: Fill) -> nn.Module:
    """FSDP2, one unit per block and one for the rest; a block is filled and at once sharded."""
    mesh = lay_out_mesh(hardware, device)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if hardware.cpu_offload else OffloadPolicy()
    blocks = cast(nn.ModuleList, find_decoder(objective.model).layers)
    whole = 0
    for block in blocks:
        fill(block)
        whole += count_bytes(block)
        fully_shard(block, mesh=mesh, offload_policy=offload)
    sharded = {id(parameter) for block in blocks for parameter in block.parameters()}
    whole += sum(p.numel() * p.element_size() for p in objective.parameters() if id(p) not in sharded)
    fully_shard(objective, mesh=mesh, offload_policy=offload)
    register_fsdp_forward_method(objective, "likeliest")
    check_share(count_bytes(objective) / whole, hardware.shard_workers)
    return objective


def lay_out_mesh(hardware: HardwareConfig, device: torch.device) -> DeviceMesh:
    """The workers in rows that hold one model each, a node's together: blocks are gathered within a row alone.

    Between nodes, whose links are slow, only gradients pass: FSDP2 averages them along the other dimension.
    """
    rows = hardware.world_size // hardware.shard_workers
    if rows == 1:
        return init_device_mesh(device.type, (hardware.world_size,))
    return init_device_mesh(device.type, (rows, hardware.shard_workers), mesh_dim_names=("replicate", "shard"))


def count_bytes(module: nn.Module) -> int:
    """Bytes of parameters that this worker holds."""
    return sum(local_part(p).numel() * p.element_size() for p in module.parameters())


def check_share(share: float, workers: int) -> None:
    """Raise ModelError when this worker holds much more than its part of the weights."""
    # Rows that do not divide leave some workers a row more; anything beyond a tenth stayed whole.
    if share > 1.1 / workers:
        raise ModelError(
            f"hardware.strategy=fsdp left {share:.0%} of the weights on one of {workers} workers; "
            "use hardware.strategy=ddp or model.quantization=nf4."
        )


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


def local_leaf(parameter: nn.Parameter) -> nn.Parameter:
    """What an optimizer updates in place of a parameter: of a sharded one a plain tensor in its shard's memory."""
    return nn.Parameter(local_part(parameter.detach())) if isinstance(parameter, DTensor) else parameter
