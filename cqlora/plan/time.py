"""How long a step takes, from operations, bytes and the machine's published speeds."""

from dataclasses import dataclass

from cqlora.config.choices import Checkpointing, Device, Optimizer, Quantization, SourceKind, Strategy
from cqlora.config.schema import DataConfig, HardwareConfig, RunConfig
from cqlora.plan.activations import kept_per_token
from cqlora.plan.estimate import packed_bytes, trainable_parameters
from cqlora.plan.shapes import embedding_parameters, linear_parameters, query_size
from cqlora.plan.workload import Rows, Workload, describe_run
from cqlora.system.machine import measure_host_tflops

MATMUL_EFFICIENCY = 0.6
"""Share of the published dense throughput that a model's matrix products reach."""

HOST_EFFICIENCY = 0.5
"""Share of a processor's measured matrix throughput that a whole step reaches, memory traffic and all."""

LINK_EFFICIENCY = 0.8
"""Share of a link's bandwidth that collectives reach on messages of a block's size."""

HOST_LINK_GB_PER_S = 25.0
"""From host memory to a GPU over PCIe 4.0 with 16 lanes, as measured rather than the nominal 32."""

ACTIVATION_PASSES = 4
"""Times that what a block keeps is written or read over a forward and a backward pass."""

TOKENS_PER_DOCUMENT = {
    SourceKind.auto: 500,
    SourceKind.wiki: 2000,
    SourceKind.text: 1000,
    SourceKind.dialog: 500,
    SourceKind.messages: 500,
    SourceKind.oasst1: 500,
    SourceKind.sharegpt: 1500,
    SourceKind.belle: 300,
    SourceKind.alpaca: 300,
    SourceKind.preference: 500,
}
"""Tokens of a document where no token cache has counted them: 50,000 of Wikipedia came to 0.1B."""


@dataclass(frozen=True, slots=True)
class TimePlan:
    """Seconds of one optimizer step by part, and what they come to."""

    parts: dict[str, float]
    tokens_per_step: int
    steps: int | None
    """Optimizer steps of the whole run; None where the data's size is not known."""

    @property
    def step_seconds(self) -> float:
        """One optimizer step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all workers together."""
        return self.tokens_per_step / self.step_seconds

    @property
    def run_seconds(self) -> float | None:
        """The whole run, without evaluation and loading."""
        return None if self.steps is None else self.steps * self.step_seconds


def plan_time(config: RunConfig, rows: Rows | None = None, tokens: int | None = None) -> TimePlan | None:
    """The time of a settled run; None where the machine's speed is not known. `tokens` are those of one epoch."""
    work = describe_run(config, rows)
    speed = find_speed(config.hardware)
    if speed is None:
        return None
    micro_steps = config.gradient_accumulation_steps
    parts = {name: seconds * micro_steps for name, seconds in micro_step_seconds(work, speed).items()}
    parts["gradient exchange"] = _exchange_seconds(work, speed)
    parts["optimizer"] = _optimizer_seconds(config, work, speed)
    per_step = config.stage.global_batch_size * config.stage.sequence_length
    of_epoch = tokens or estimate_tokens(config.data, config.stage.name)
    per_epoch = of_epoch / per_step if of_epoch else None
    steps = config.stage.max_steps
    if steps is None and per_epoch is not None:
        steps = max(1, round(per_epoch * (config.stage.epochs or 1.0)))
    return TimePlan(parts=parts, tokens_per_step=per_step, steps=steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What one worker's device and links can do, in operations and bytes per second."""

    matmul: float
    memory: float
    """0 where it is within `matmul` already."""
    link: float
    """Between any two workers."""
    near_link: float
    """Between two workers that hold one model together."""
    host_link: float


def find_speed(hardware: HardwareConfig) -> Speed | None:
    """The speed of one worker, from the hardware group or measured on this processor."""
    if hardware.device is Device.cpu:
        # Workers share the processor.
        flops = hardware.peak_tflops * 1e12 or measure_host_tflops() * 1e12
        share = HOST_EFFICIENCY / hardware.processes_per_node
        return Speed(matmul=share * flops, memory=0.0, link=10e9, near_link=10e9, host_link=10e9)
    if not (hardware.peak_tflops and hardware.memory_gb_per_s):
        return None
    near = link = hardware.link_gb_per_s
    if hardware.nodes > 1:
        link = min(link, hardware.network_gb_per_s / hardware.processes_per_node)
        near = near if hardware.processes_per_node > 1 else link
    return Speed(
        matmul=MATMUL_EFFICIENCY * hardware.peak_tflops * 1e12,
        memory=hardware.memory_gb_per_s * 1e9,
        link=LINK_EFFICIENCY * link * 1e9,
        near_link=LINK_EFFICIENCY * near * 1e9,
        host_link=LINK_EFFICIENCY * min(HOST_LINK_GB_PER_S, link or HOST_LINK_GB_PER_S) * 1e9,
    )


def micro_step_seconds(work: Workload, speed: Speed) -> dict[str, float]:
    """One forward and backward pass of one worker; gathering counts where it takes longer than the work."""
    passes = 3 if work.checkpointing is Checkpointing.full else 2
    compute = {
        "matrix products": work.tokens * flops_per_token(work) / speed.matmul,
        "dequantisation": _dequantization_seconds(work, speed, passes),
        "other operations": _elementwise_seconds(work, speed),
    }
    moved = _gathering_seconds(work, speed)
    return {**compute, "waiting for weights": max(0.0, moved - sum(compute.values()))}


def flops_per_token(work: Workload) -> float:
    """Operations of matrix products for one token of a step.

    A frozen matrix is multiplied forward and once backward, a trained one twice backward; full checkpointing
    multiplies both forward once more, but for the last of a block where nothing is kept of its product.
    Attention is causal, and as if each pack were a single document.
    """
    again = work.checkpointing is Checkpointing.full
    model = work.model
    last = model.hidden_size * model.intermediate_size * model.num_hidden_layers
    repeated = linear_parameters(model) - last * work.program.lean_mlp
    frozen = 4 * linear_parameters(model) + 2 * again * repeated
    adapter = (6 + 2 * again) * (trainable_parameters(work) - work.trained_embedding)
    head = 4 * model.vocab_size * model.hidden_size
    attention = (3.5 + again) * 2 * query_size(model) * work.pack_tokens * model.num_hidden_layers
    return frozen + adapter + head + attention


def _dequantization_seconds(work: Workload, speed: Speed, passes: int) -> float:
    if work.model.quantization is Quantization.none or not speed.memory:
        return 0.0
    parameters = linear_parameters(work.model)
    moved = sum(packed_bytes(work, parameters)) + work.program.compute_bytes * parameters
    return passes * moved / speed.memory


def _elementwise_seconds(work: Workload, speed: Speed) -> float:
    if not speed.memory:
        return 0.0
    kept = kept_per_token(work.model, work.lora, work.program) * work.model.num_hidden_layers
    passes = ACTIVATION_PASSES + (2 if work.checkpointing is Checkpointing.full else 0)
    return passes * work.tokens * kept / speed.memory


def _gathering_seconds(work: Workload, speed: Speed) -> float:
    """Moving every block to where it is needed, once forward and once backward."""
    if work.shards == 1 or not speed.near_link:
        return 0.0
    packed, _ = packed_bytes(work, linear_parameters(work.model))
    adapter = (trainable_parameters(work) - work.trained_embedding) * work.program.adapter_bytes
    root = embedding_parameters(work.model) * work.program.embedding_bytes
    whole = 2 * (packed + adapter) + root
    gathered = whole * (work.shards - 1) / work.shards / speed.near_link
    staged = whole / work.shards / speed.host_link if work.cpu_offload else 0.0
    return gathered + staged


def _exchange_seconds(work: Workload, speed: Speed) -> float:
    """Averaging the gradients over workers, once a step."""
    if work.workers == 1 or work.strategy is Strategy.layers or not speed.link:
        return 0.0
    trained = trainable_parameters(work) * work.program.adapter_bytes
    if work.strategy is not Strategy.fsdp:
        return 2 * trained * (work.workers - 1) / work.workers / speed.link
    scattered = trained * (work.shards - 1) / work.shards / speed.near_link
    return scattered + 2 * trained / work.shards * (work.copies - 1) / work.copies / speed.link


def _optimizer_seconds(config: RunConfig, work: Workload, speed: Speed) -> float:
    """Reading gradients, reading and writing parameters and states."""
    trained = trainable_parameters(work) / work.shards
    moved = trained * (3 * work.program.adapter_bytes + 2 * 8)
    if work.cpu_offload or config.stage.optimizer in (Optimizer.paged_adamw, Optimizer.paged_adamw_8bit):
        return moved / speed.host_link
    return moved / speed.memory if speed.memory else moved / 10e9


def estimate_tokens(data: DataConfig, stage: str) -> int | None:
    """Tokens of one epoch by the documents asked for; None where a source takes all that it finds."""
    if data.sample_evenly is not None:
        kinds = [source.kind for source in data.sources.values() if stage in source.stages]
        return round(data.sample_evenly * sum(TOKENS_PER_DOCUMENT[kind] for kind in kinds) / len(kinds))
    total = 0.0
    for source in data.sources.values():
        if stage not in source.stages:
            continue
        if source.sample_tokens is not None:
            total += source.sample_tokens * source.weight
        elif source.sample is not None:
            total += source.sample * TOKENS_PER_DOCUMENT[source.kind] * source.weight
        else:
            return None
    return round(total)
