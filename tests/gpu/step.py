"""A training step of a model that is loaded, adapted, fused and placed as a run's is, on any device."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cqlora.base import read_base
from cqlora.config.schema import RunConfig
from cqlora.model.adapters import attach_adapter
from cqlora.model.batch import build_batch
from cqlora.model.fused import fuse_blocks
from cqlora.model.fused.linear import adapters_cast_once
from cqlora.model.load import COMPUTE_DTYPES, checkpoint_activations, open_model
from cqlora.model.objective import Objective
from cqlora.model.placement import place
from cqlora.train.optimizer import build_optimizer
from tests.gpu.hollow_base import write_hollow_base
from tests.plan.runs import compose_run

DOCUMENTS = 4
"""Of a pack, all of one length."""
DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class FullPack:
    """A pack without a gap, every token of it a label."""

    token_ids: np.ndarray[Any, np.dtype[np.int64]]
    label_mask: np.ndarray[Any, np.dtype[np.bool_]]
    document_lengths: list[int]
    source_ids: list[int]


def full_pack(tokens: int) -> FullPack:
    """`DOCUMENTS` documents that fill a pack."""
    lengths = [tokens // DOCUMENTS] * DOCUMENTS
    return FullPack(np.zeros(tokens, np.int64), np.ones(tokens, np.bool_), lengths, [0] * DOCUMENTS)


def compose_hollow(folder: Path, *overrides: str) -> RunConfig:
    """A run's settled configuration, its base without weights in `folder`."""
    plain = () if find_spec("triton") else ("hardware.kernels=plain",)
    config = compose_run("stage=pretrain", "data=sample", f"model.path={folder}", *plain, *overrides)
    write_hollow_base(config.model, folder)
    return config


def build_module(config: RunConfig, device: torch.device = DEVICE) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What `train.run.train_as` makes of a configuration, between its checks and its trainer."""
    base, dtype = read_base(config.model.path), COMPUTE_DTYPES[config.hardware.precision]
    frozen, fill = open_model(base, config.model, config.hardware, device, dtype)
    model = attach_adapter(frozen, base, config.lora, config.stage.embeddings, "")
    checkpoint_activations(model, config.hardware.activation_checkpointing)
    fused = fuse_blocks(model, config.hardware.kernels)
    module = place(Objective(model, dtype, autocast=not fused), config.hardware, device, fill)
    return module.train(), build_optimizer(module, config.stage, config.lora.b_learning_rate_ratio)


def begin_second_step(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Moments, and gradients of earlier micro batches, for every trained parameter; return those."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return trained


def end_step(
    config: RunConfig, module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device = DEVICE
) -> None:
    """A later step's last micro batch, and the update."""
    trained = begin_second_step(module, optimizer)
    take_micro_batch(config, module, device=device)
    nn.utils.clip_grad_norm_(trained, config.stage.max_grad_norm)
    optimizer.step()
    module.zero_grad(set_to_none=True)


def take_micro_batch(
    config: RunConfig,
    module: nn.Module,
    after_forward: Callable[[], Any] = lambda: None,
    device: torch.device = DEVICE,
) -> None:
    """Forward and backward of a step's only micro batch."""
    packs = [full_pack(config.stage.sequence_length)] * config.hardware.micro_batch_size
    with adapters_cast_once(module, COMPUTE_DTYPES[config.hardware.precision]):
        loss, _ = module(build_batch(packs, device), 1.0)
        after_forward()
        (loss * config.hardware.world_size).backward()
