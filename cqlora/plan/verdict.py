"""Whether a run fits, in a sentence, and where it does not, the smallest changes that make it fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cqlora.config.base_shape import RESOLVER
from cqlora.config.choices import AdapterMethod, Checkpointing, Device, Kernels, Optimizer, Precision, Quantization
from cqlora.config.schema import CONFIG_DIR, HardwareConfig, ModelConfig, RunConfig
from cqlora.errors import ConfigError
from cqlora.plan.estimate import GIB
from cqlora.plan.fit import Fit, least_bytes
from cqlora.plan.layouts import Option, list_layouts, suggest_layouts, weigh
from cqlora.plan.memory import choose_checkpointing, plan_memory
from cqlora.plan.workload import Rows

MAX_CHANGES = 3
MAX_MACHINES = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run stands to its machine."""

    fit: Fit
    sentence: str
    suggestions: list[Option]
    """What would fit, the smallest changes first; empty where the run fits as it is."""

    @property
    def refusal(self) -> str:
        """One sentence for whoever asked for a run that does not fit."""
        first = f"add {self.suggestions[0].command}, or " if self.suggestions else ""
        return f"the run {self.sentence}; {first}see what would fit with `cqlora plan`."


def judge(config: RunConfig, rows: Rows | None = None) -> Verdict:
    """Say whether a run fits, and what would."""
    memory = plan_memory(config, rows)
    name, where = config.hardware.name, "per GPU" if memory.device.name == "cuda" else "per process"
    if memory.fit is not Fit.does_not_fit:
        has = f" of {memory.capacity / GIB:.1f}" if memory.capacity else ""
        room = "" if memory.fit is Fit.fits else ", so little room that it may fail"
        return Verdict(memory.fit, f"takes {memory.peak / GIB:.1f}{has} GiB {where}{room}", [])
    if memory.capacity is not None and least_bytes(memory.worker) > memory.capacity:
        needed, there = least_bytes(memory.worker) / GIB, memory.capacity / GIB
        lacks = f"needs {needed:.1f} GiB {where}, and hardware={name} has {there:.1f}"
    else:
        there = (memory.host_capacity or 0.0) / GIB
        lacks = f"needs {memory.host / GIB:.1f} GiB of host memory, and hardware={name} has {there:.1f}"
    return Verdict(memory.fit, lacks, suggest_changes(config, rows))


def suggest_changes(config: RunConfig, rows: Rows | None = None) -> list[Option]:
    """The smallest changes that fit: other layouts first, then other settings, machines and models."""
    fitting = [option for option in list_layouts(config, rows) if option.memory.fit is Fit.fits]
    found = _smallest(fitting)
    if not found:
        found = _smallest(list(_other_settings(config, rows)))
    machines = _other_machines(config, rows)
    return found[:MAX_CHANGES] + machines[:MAX_MACHINES] + _smaller_models(config, rows)


def _smallest(options: list[Option]) -> list[Option]:
    """Of the options that change the same keys the fastest; those that change fewest keys first."""
    best: dict[tuple[str, ...], Option] = {}
    for option in options:
        keys = tuple(option.overrides)
        if keys not in best or option.seconds_per_token < best[keys].seconds_per_token:
            best[keys] = option
    chosen: list[Option] = []
    for option in sorted(best.values(), key=lambda option: (len(option.overrides), option.seconds_per_token)):
        # A larger change is worth telling only where it is faster than a smaller one.
        if all(option.seconds_per_token < other.seconds_per_token for other in chosen):
            chosen.append(option)
    return chosen


def _other_settings(config: RunConfig, rows: Rows | None) -> Iterator[Option]:
    """Changes that touch the result a little: optimizer states, length, rank, quantisation; each alone."""
    model, lora, stage = config.model, config.lora, config.stage
    edits: list[tuple[dict[str, str], dict[str, Any]]] = []
    if model.quantization is not Quantization.nf4:
        nf4 = replace(model, quantization=Quantization.nf4)
        edits.append(({"model.quantization": "nf4"}, {"model": nf4}))
    if stage.optimizer is not Optimizer.paged_adamw_8bit:
        paged = replace(stage, optimizer=Optimizer.paged_adamw_8bit)
        edits.append(({"stage.optimizer": "paged_adamw_8bit"}, {"stage": paged}))
    for length in (stage.sequence_length // 2, stage.sequence_length // 4):
        if length >= 256:
            shorter = replace(stage, sequence_length=length)
            edits.append(({"stage.sequence_length": str(length)}, {"stage": shorter}))
    if lora.rank >= 16 and lora.method is not AdapterMethod.none:
        edits.append(({"lora.rank": str(lora.rank // 4)}, {"lora": replace(lora, rank=lora.rank // 4)}))
    for typed, changes in edits:
        fitting = suggest_layouts(replace(config, **changes), rows)
        for option in fitting[:1]:
            yield replace(option, overrides={**typed, **option.overrides})


def _other_machines(config: RunConfig, rows: Rows | None) -> list[Option]:
    """The smallest machines of the hardware group that hold the run, each in its fastest layout."""
    found = []
    for hardware in _read_group("hardware", HardwareConfig):
        if hardware.name == config.hardware.name or not _is_described(hardware):
            continue
        try:
            option = weigh(_move(config, hardware, rows), {"hardware": hardware.name}, rows)
        except ConfigError:
            continue
        if option.memory.fit is not Fit.fits:
            layouts = suggest_layouts(option.config, rows)[:1]
            option = replace(layouts[0], overrides={**option.overrides, **layouts[0].overrides}) if layouts else option
        if option.memory.fit is Fit.fits:
            found.append(option)
    found.sort(key=lambda option: (_total_memory(option.config.hardware), option.seconds_per_token))
    return found


def _is_described(hardware: HardwareConfig) -> bool:
    """Whether a group names all figures of its GPUs that settling a run would otherwise ask the machine for."""
    return hardware.gpu_memory_gib > 0 and hardware.device is Device.cuda and hardware.precision is not Precision.auto


def _move(config: RunConfig, hardware: HardwareConfig, rows: Rows | None) -> RunConfig:
    """A settled run on another machine, settled there; all described GPUs run Triton's kernels."""
    on_gpu = config.hardware.device is Device.cuda
    hardware = replace(hardware, kernels=config.hardware.kernels if on_gpu else Kernels.triton)
    moved = replace(config, hardware=hardware)
    if hardware.activation_checkpointing is not Checkpointing.auto:
        return moved
    return replace(moved, hardware=replace(hardware, activation_checkpointing=choose_checkpointing(moved, rows)))


def _total_memory(hardware: HardwareConfig) -> float:
    gpus = hardware.nodes * max(hardware.processes_per_node, hardware.gpus_per_node)
    return gpus * hardware.gpu_memory_gib


def _smaller_models(config: RunConfig, rows: Rows | None) -> list[Option]:
    """The largest model of the same line that fits on the machine."""
    line = config.model.name.rpartition("_")[0]
    if not line:
        return []
    size = _size(config.model)
    models = [m for m in _read_group("model", ModelConfig) if m.name.rpartition("_")[0] == line and _size(m) < size]
    for model in sorted(models, key=_size, reverse=True):
        model = replace(model, attention=config.model.attention)
        try:
            smaller = replace(config, model=model)
        except ConfigError:
            continue
        added = rows.added if rows else 0
        for option in suggest_layouts(smaller, Rows(model.vocab_size + added, added))[:1]:
            return [replace(option, overrides={"model": model.name, **option.overrides})]
    return []


def _size(model: ModelConfig) -> int:
    return model.num_hidden_layers * model.hidden_size * (model.hidden_size + model.intermediate_size)


def _read_group(group: str, schema: type) -> Iterator[Any]:
    """The typed choices of a configuration group, each with the files that it is built on; those for Slurm, which
    submit another choice, and the one that stands for any folder's shape are left out."""
    for file in sorted(Path(CONFIG_DIR, group).glob("*.yaml")):
        values: Any = OmegaConf.load(file)
        if f"${{{RESOLVER}:" in file.read_text(encoding="utf-8"):
            continue
        parts = [each.partition("@") for each in values.pop("defaults", [])]
        if all(package == "_here_" for _, _, package in parts):
            beneath = [OmegaConf.load(file.parent / f"{name}.yaml") for name, _, _ in parts]
            yield OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *beneath, values))
