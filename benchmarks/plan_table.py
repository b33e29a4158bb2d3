"""The tables of docs/hardware.md, made by the planner: `python benchmarks/plan_table.py`."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cqlora.config.choices import Checkpointing
from cqlora.config.schema import CONFIG_DIR, RunConfig, register_schemas
from cqlora.launch.settle import look_ahead, settle
from cqlora.plan.estimate import GIB
from cqlora.plan.layouts import Option, suggest_layouts

MODELS = ("llama2_7b", "llama2_13b", "llama_33b", "llama_65b", "llama2_70b")
MACHINES = ("1x4090", "2x4090", "1xa100_40g", "4xa100_40g", "1xa100", "4xa100", "8xh100")
LENGTHS = (512, 1024, 2048, 4096)
COMMON = ("stage=pretrain", "lora.rank=64", "stage.global_batch_size=128")


def machine_table() -> Iterator[str]:
    """For each machine and model the fastest layout at 2,048 tokens."""
    yield f"| hardware | {' | '.join(MODELS)} |"
    yield f"|---|{'---|' * len(MODELS)}"
    for machine in MACHINES:
        cells = (tell_layout(find_fastest(machine, model, 2048)) for model in MODELS)
        yield f"| `{machine}` | {' | '.join(cells)} |"


def length_table() -> Iterator[str]:
    """For each length the largest micro batch of some layouts."""
    runs = (
        ("1x4090", "llama2_7b"),
        ("1x4090", "llama2_13b"),
        ("4xa100_40g", "llama_65b"),
        ("4xa100", "llama_65b"),
    )
    yield f"| tokens of a pack | {' | '.join(f'`{machine}` {model}' for machine, model in runs)} |"
    yield f"|---|{'---|' * len(runs)}"
    for length in LENGTHS:
        cells = (str(largest_micro_batch(machine, model, length) or "–") for machine, model in runs)
        yield f"| {length:,} | {' | '.join(cells)} |"


def find_fastest(machine: str, model: str, length: int) -> Option | None:
    """The fastest layout that fits."""
    return next(iter(suggest_layouts(compose_run(machine, model, length))), None)


def largest_micro_batch(machine: str, model: str, length: int) -> int | None:
    """The largest micro batch, in the group's own strategy, with full checkpointing."""
    config = compose_run(machine, model, length)
    fitting = [
        option.config.hardware.micro_batch_size
        for option in suggest_layouts(config)
        if option.config.hardware.strategy is config.hardware.strategy
        and option.config.hardware.activation_checkpointing is Checkpointing.full
        and not option.config.hardware.cpu_offload
    ]
    return max(fitting, default=None)


def compose_run(machine: str, model: str, length: int) -> RunConfig:
    """One run of the tables; Hydra composes each choice once, since that takes longer than planning."""
    config = compose_choice("stage.allow_beyond_positions=true")
    chosen = replace(
        config,
        hardware=compose_choice(f"hardware={machine}").hardware,
        model=compose_choice(f"model={model}").model,
        stage=replace(config.stage, sequence_length=length),
    )
    return settle(chosen, look_ahead(chosen))


@cache
def compose_choice(override: str) -> RunConfig:
    """The configuration with one choice made."""
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        config: Any = OmegaConf.to_object(compose("config", [*COMMON, override]))
    assert isinstance(config, RunConfig)
    return config


def tell_layout(option: Option | None) -> str:
    """A layout in a cell: strategy, micro batch, memory, speed."""
    if option is None or option.time is None:
        return "–"
    hardware = option.config.hardware
    words = [hardware.strategy.name] if hardware.world_size > 1 else []
    words += ["offload"] * hardware.cpu_offload
    words.append(f"{hardware.micro_batch_size}{'' if is_recomputing(option) else ' kept'}")
    return f"{' '.join(words)}: {option.memory.peak / GIB:.0f} GiB, {option.time.tokens_per_second:,.0f}/s"


def is_recomputing(option: Option) -> bool:
    """Whether activations are recomputed."""
    return option.config.hardware.activation_checkpointing is Checkpointing.full


if __name__ == "__main__":
    print("\n".join(machine_table()), end="\n\n")
    print("\n".join(length_table()))
