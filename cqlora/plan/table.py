"""A plan as people read it, at most 100 columns wide."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cqlora.config.choices import Device, Precision
from cqlora.config.schema import RunConfig
from cqlora.plan.estimate import GIB
from cqlora.plan.fit import Fit
from cqlora.plan.layouts import Option
from cqlora.plan.memory import MemoryPlan
from cqlora.plan.time import TimePlan
from cqlora.plan.verdict import Verdict

_WIDTH = 100
_SHOWN_BYTES = 0.0005 * GIB
_STYLES = {Fit.fits: "bold green", Fit.tight: "bold yellow", Fit.does_not_fit: "bold red"}
_WHAT = {
    "weights": "frozen base, as it is quantised",
    "embeddings": "input embedding and output projection",
    "adapter": "trainable parameters",
    "optimizer states": "AdamW's two moments",
    "gradients": "of the trainable parameters",
    "activations": "kept for the backward pass, and one block at work",
    "logits": "of one chunk of label positions",
    "gathered units": "blocks made whole from their shards",
    "buffers": "dequantised matrix, casts, embedding gradient",
    "allocator": "lost to fragments",
}


_KERNELS = (
    "Not counted: code that oneDNN generates for bfloat16 and keeps, some for each new shape; about\n"
    "1 GiB after some hundred steps (ONEDNN_PRIMITIVE_CACHE_CAPACITY bounds it)."
)
"""Measured on the tiny model: resident memory rises from 0.64 to 1.54 GiB in 227 steps, in float32 it stays at 0.49."""


def print_plan(
    config: RunConfig,
    memory: MemoryPlan,
    time: TimePlan | None,
    verdict: Verdict,
    console: Console | None = None,
) -> None:
    """Print one run's plan: memory by part, phases, host and disk, time, verdict, changes that would fit."""
    console = console or Console(width=_WIDTH, highlight=False)
    console.print(_describe(config))
    console.print(_memory_table(memory))
    console.print(_phase_line(memory))
    if memory.device is Device.cpu and config.hardware.precision is Precision.bfloat16:
        console.print(_KERNELS)
    console.print(_time_line(time))
    console.print(Text(f"{verdict.fit.value}: ", style=_STYLES[verdict.fit]) + Text(f"{verdict.sentence}."))
    if verdict.suggestions:
        console.print()
        console.print(options_table(verdict.suggestions, time, "What would fit"))


def options_table(options: list[Option], now: TimePlan | None, title: str) -> Table:
    """Configurations to choose from, with memory, time, and the time's change against `now`."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("add to the command", ratio=1, overflow="fold")
    for heading in ("GiB", "host GiB", "a step", "the run", "tokens/s", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for option in options:
        time = option.time
        table.add_row(
            option.command,
            f"{option.memory.peak / GIB:.1f}",
            f"{option.memory.host / GIB:.0f}",
            tell_seconds(time.step_seconds if time else None),
            tell_seconds(time.run_seconds if time else None),
            f"{time.tokens_per_second:,.0f}" if time else "?",
            _change(time, now),
        )
    return table


def tell_seconds(seconds: float | None) -> str:
    """A duration in the unit that suits it."""
    if seconds is None:
        return "?"
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


def _describe(config: RunConfig) -> str:
    hardware, stage = config.hardware, config.stage
    layout = f"{hardware.strategy.name}{' with offload' if hardware.cpu_offload else ''}"
    return (
        f"model={config.model.name} ({config.model.quantization.name})  stage={stage.name}  "
        f"hardware={hardware.name}  lora.rank={config.lora.rank}\n"
        f"{layout}, activation checkpointing {hardware.activation_checkpointing.name}, micro batch "
        f"{hardware.micro_batch_size} × {stage.sequence_length} tokens, {config.gradient_accumulation_steps} "
        f"accumulated, {hardware.world_size} worker{'s' * (hardware.world_size > 1)}"
    )


def _memory_table(memory: MemoryPlan) -> Table:
    whose = "one GPU" if memory.worker.context and memory.device.name == "cuda" else "one process"
    table = Table(
        title=f"Memory of {whose} at the peak of a step", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("share", justify="right")
    table.add_column("what it is")
    context = "CUDA, cuBLAS, NCCL" if memory.device.name == "cuda" else "Python, torch, transformers"
    for part, size in memory.parts.items():
        if size >= _SHOWN_BYTES:
            share = f"{size / memory.step:.0%}"
            table.add_row(part, _gib(size), share, {**_WHAT, "context": context}[part])
    table.add_row("together", _gib(memory.step), "100%", f"reached at the {memory.worker.moment}", style="bold")
    return table


def _phase_line(memory: MemoryPlan) -> str:
    phases = ", ".join(f"{name} {_gib(size)}" for name, size in memory.phases.items())
    has = f" of {_gib(memory.capacity)}" if memory.capacity else ""
    host_has = f" of {_gib(memory.host_capacity)}" if memory.host_capacity else ""
    return (
        f"Peaks in GiB: {phases}{has}.  Host memory of a node: {_gib(memory.host)}{host_has}.  "
        f"Checkpoints on disk: {_gib(memory.disk)}."
    )


def _time_line(time: TimePlan | None) -> str:
    if time is None:
        return "Time: not planned, since hardware.peak_tflops or hardware.memory_gb_per_s is 0."
    longest = sorted(time.parts.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {seconds / time.step_seconds:.0%}" for name, seconds in longest if seconds)
    line = f"Time: {tell_seconds(time.step_seconds)} a step ({parts}), {time.tokens_per_second:,.0f} tokens/s"
    if time.steps is None:
        return line + "; an epoch's length is known once `cqlora prepare` has counted, or with tokens=NUMBER."
    return line + f"; {time.steps:,} steps in {tell_seconds(time.run_seconds)}."


def _gib(size: float) -> str:
    """GiB, to the megabyte where there is less than one."""
    gib = size / GIB
    return f"{gib:.1f}" if gib >= 1 else f"{gib:.3f}"


def _change(time: TimePlan | None, now: TimePlan | None) -> str:
    if time is None or now is None:
        return "?"
    change = now.tokens_per_second / time.tokens_per_second - 1
    return f"{change:+.0%}" if change < 1 else f"×{change + 1:.1f}"
