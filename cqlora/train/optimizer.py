"""The optimizer, its parameter groups and the learning rate of each step."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from cqlora.config.choices import Optimizer, Schedule
from cqlora.config.schema import StageConfig
from cqlora.model.adapters import EMBEDDING_MODULES
from cqlora.model.placement import local_leaf, local_part


def build_optimizer(model: nn.Module, stage: StageConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over what this worker holds of the trainable parameters, embedding rows in a group of their own."""
    rows: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    shards: list[tuple[nn.Parameter, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and local_part(parameter).numel():
            own = local_leaf(parameter)
            if own is not parameter:
                shards.append((parameter, own))
            (rows if set(name.split(".")) & set(EMBEDDING_MODULES) else rest).append(own)
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
    optimizer = choose_optimizer(stage.optimizer)(groups, lr=stage.learning_rate, **options)
    if shards:
        lend_gradients(optimizer, shards)
    return optimizer


def choose_optimizer(choice: Optimizer) -> Callable[..., torch.optim.Optimizer]:
    """The constructor of an optimizer."""
    if choice is Optimizer.adamw:
        return partial(torch.optim.AdamW, fused=True)
    import bitsandbytes as bnb

    kinds: dict[Optimizer, Callable[..., torch.optim.Optimizer]] = {
        Optimizer.adamw_8bit: bnb.optim.AdamW8bit,
        Optimizer.paged_adamw: bnb.optim.PagedAdamW32bit,
        Optimizer.paged_adamw_8bit: bnb.optim.PagedAdamW8bit,
    }
    return kinds[choice]


def load_optimizer(optimizer: torch.optim.Optimizer, states: dict[str, Any]) -> None:
    """Load states; those that bitsandbytes pages go to host memory again, where its own loading leaves none."""
    optimizer.load_state_dict(states)
    if not getattr(optimizer, "is_paged", False):
        return
    paged: Any = optimizer
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if isinstance(values := state.get(name), torch.Tensor):
                state[name] = paged.get_state_buffer(parameter, dtype=values.dtype).copy_(values)


def lend_gradients(optimizer: torch.optim.Optimizer, shards: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Give the plain tensors that a step updates the gradients of the sharded parameters, for that step.

    AdamW works element by element, so each worker updates its shards alone, also by bitsandbytes' kernels,
    which know no sharded tensors.
    """

    def lend(*arguments: Any) -> None:
        for parameter, own in shards:
            own.grad = None if parameter.grad is None else local_part(parameter.grad)

    def take_back(*arguments: Any) -> None:
        for _, own in shards:
            own.grad = None

    optimizer.register_step_pre_hook(lend)
    optimizer.register_step_post_hook(take_back)


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
