"""The ways to lay one run out on one machine: micro batch, checkpointing, strategy, offload."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from cqlora.config.choices import Checkpointing, Strategy
from cqlora.config.schema import HardwareConfig, RunConfig
from cqlora.errors import ConfigError
from cqlora.plan.fit import Fit
from cqlora.plan.memory import MemoryPlan, plan_memory
from cqlora.plan.time import TimePlan, plan_time
from cqlora.plan.workload import Rows


@dataclass(frozen=True, slots=True)
class Option:
    """A configuration that could be run instead, as what to type, with what it takes."""

    overrides: dict[str, str]
    """What to add to the command; empty for the run as it was asked for."""
    config: RunConfig
    memory: MemoryPlan
    time: TimePlan | None

    @property
    def command(self) -> str:
        """What to add to the command."""
        return " ".join(f"{key}={value}" for key, value in self.overrides.items()) or "as asked for"

    @property
    def seconds_per_token(self) -> float:
        """Infinite where the machine's speed is not known."""
        return 1 / self.time.tokens_per_second if self.time else float("inf")


def weigh(config: RunConfig, overrides: dict[str, str], rows: Rows | None = None) -> Option:
    """Plan one settled configuration."""
    return Option(overrides, config, plan_memory(config, rows), plan_time(config, rows))


def list_layouts(config: RunConfig, rows: Rows | None = None) -> Iterator[Option]:
    """Every layout of a run on its machine, with the overrides that lead there from `config`."""
    for changes in product(
        _strategies(config.hardware), (Checkpointing.none, Checkpointing.full), _micro_batches(config)
    ):
        (strategy, checkpointing, micro_batch) = changes
        hardware = {
            **strategy,
            "activation_checkpointing": checkpointing,
            "micro_batch_size": micro_batch,
        }
        try:
            changed = replace(config, hardware=replace(config.hardware, **hardware))
        except ConfigError:
            continue
        yield weigh(changed, _overrides(config, changed), rows)


def suggest_layouts(config: RunConfig, rows: Rows | None = None) -> list[Option]:
    """The layouts that fit, the fastest first; of two as fast the one that takes less memory."""
    fitting = [option for option in list_layouts(config, rows) if option.memory.fit is Fit.fits]
    return sorted(fitting, key=lambda option: (option.seconds_per_token, option.memory.peak))


def _strategies(hardware: HardwareConfig) -> list[dict[str, Any]]:
    gpus = max(hardware.processes_per_node, hardware.gpus_per_node)
    if hardware.nodes * gpus == 1:
        return [{"strategy": Strategy.single, "cpu_offload": False}]
    workers: dict[str, Any] = {"processes_per_node": gpus, "gpus_per_node": 0}
    options: list[dict[str, Any]] = [
        {**workers, "strategy": Strategy.ddp, "cpu_offload": False},
        {**workers, "strategy": Strategy.fsdp, "cpu_offload": False},
        {**workers, "strategy": Strategy.fsdp, "cpu_offload": True},
    ]
    if hardware.nodes == 1:
        layers = {"processes_per_node": 1, "gpus_per_node": gpus, "cpu_offload": False}
        options.append({**layers, "strategy": Strategy.layers})
    return options


def _micro_batches(config: RunConfig) -> list[int]:
    """Powers of two up to what one worker has of a global batch; what does not divide it is refused later."""
    most = config.stage.global_batch_size
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def _overrides(before: RunConfig, after: RunConfig) -> dict[str, str]:
    """What to type to come from one layout to another."""
    keys = (
        "strategy",
        "processes_per_node",
        "gpus_per_node",
        "cpu_offload",
        "activation_checkpointing",
        "micro_batch_size",
    )
    changed = {}
    for key in keys:
        old, new = getattr(before.hardware, key), getattr(after.hardware, key)
        if old != new:
            changed[f"hardware.{key}"] = _as_typed(new)
    return changed


def _as_typed(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "name", value))
