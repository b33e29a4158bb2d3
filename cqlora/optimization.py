"""The optimizer, its parameter groups and the learning rate of each step."""

import math
from typing import Any

import torch
from torch import nn

from cqlora.choices import Optimizer, Schedule
from cqlora.config import StageConfig
from cqlora.model.adapters import EMBEDDING_MODULES


def build_optimizer(model: nn.Module, stage: StageConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, embedding rows in a group of their own."""
    rows: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (rows if set(name.split(".")) & set(EMBEDDING_MODULES) else rest).append(parameter)
    rate = stage.learning_rate
    groups = [{"params": rest, "peak_lr": rate, "lr": rate}]
    if rows:
        rate = stage.embeddings_learning_rate or rate
        groups.append({"params": rows, "peak_lr": rate, "lr": rate})
    options: dict[str, Any] = {
        "betas": (stage.adam_beta1, stage.adam_beta2),
        "eps": stage.adam_epsilon,
        "weight_decay": stage.weight_decay,
    }
    if stage.optimizer in (Optimizer.auto, Optimizer.adamw):
        return torch.optim.AdamW(groups, lr=stage.learning_rate, fused=True, **options)
    import bitsandbytes as bnb

    kinds = {
        Optimizer.adamw_8bit: bnb.optim.AdamW8bit,
        Optimizer.paged_adamw: bnb.optim.PagedAdamW32bit,
        Optimizer.paged_adamw_8bit: bnb.optim.PagedAdamW8bit,
    }
    optimizer: torch.optim.Optimizer = kinds[stage.optimizer](groups, lr=stage.learning_rate, **options)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, stage: StageConfig, step: int, total_steps: int) -> float:
    """Give every group its learning rate for `step`, counted from 0; return that of the low-rank matrices."""
    share = learning_rate_share(stage, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
    return stage.learning_rate * share


def learning_rate_share(stage: StageConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step as a share of the peak: linear warm-up in optimizer steps, then the schedule.

    The first step trains at 1/warmup_steps of the peak, step `warmup_steps` (from 1) at the peak, the last
    one of a decaying schedule at min_learning_rate_ratio.
    """
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    if stage.schedule is Schedule.constant:
        return 1.0
    decay_steps = max(1, total_steps - 1 - stage.warmup_steps)
    progress = min(1.0, (step - stage.warmup_steps) / decay_steps)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if stage.schedule is Schedule.cosine else 1 - progress
    return stage.min_learning_rate_ratio + (1 - stage.min_learning_rate_ratio) * shape
