"""What has to be held at once: one micro batch on one worker, and how a configuration becomes that."""

from dataclasses import dataclass, field, replace

from cqlora.config.choices import (
    AdapterMethod,
    Attention,
    Checkpointing,
    Device,
    Embeddings,
    Kernels,
    Optimizer,
    Precision,
    Quantization,
    Strategy,
)
from cqlora.config.schema import HardwareConfig, LoraConfig, ModelConfig, RunConfig, StageConfig
from cqlora.plan.program import Program
from cqlora.plan.shapes import adapted_matrices, embedding_matrices

_STATE_BYTES = {
    Optimizer.adamw: 8.0,
    Optimizer.adamw_8bit: 2.0,
    Optimizer.paged_adamw: 8.0,
    Optimizer.paged_adamw_8bit: 2.0,
}
"""AdamW's two moments of one number."""
_PAGED = {Optimizer.paged_adamw, Optimizer.paged_adamw_8bit}
"""Whose moments wait in host memory while a step needs room."""
_PAGED_NUMBERS = 100_000
"""bitsandbytes pages the moments of tensors with at least so many numbers; those of smaller ones stay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One micro batch of one run on one worker."""

    model: ModelConfig
    """Its `vocab_size` counts the rows that an extension added."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    trained_embedding: int = 0
    """Trainable numbers beside the blocks' adapters: new rows, low-rank or whole embeddings."""
    program: Program = field(default_factory=Program)
    tokens: int
    """Tokens of a micro batch."""
    pack_tokens: int
    """Tokens of one pack, within which a token attends to those before it."""
    strategy: Strategy = Strategy.single
    workers: int = 1
    """Workers that share the weights (fsdp) or hold copies (ddp); GPUs under `layers`."""
    copies: int = 1
    """Whole models among the workers of fsdp: one a node."""
    cpu_offload: bool = False
    offload_activations: bool = False
    """Checkpointed activations wait in host memory."""
    checkpointing: Checkpointing = Checkpointing.full
    training: bool = True
    """False is loading and reading a model only."""

    @property
    def shards(self) -> int:
        """Parts that each tensor is split into."""
        return self.workers // self.copies if self.strategy is Strategy.fsdp else 1


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the embedding matrices, as the base's folder says or as an extension will leave them."""

    total: int
    added: int = 0
    """Those that an extension adds."""


def describe_run(config: RunConfig, rows: Rows | None = None) -> Workload:
    """The micro batch of a settled run; without `rows` the base is as its model group says and not extended."""
    rows = rows or Rows(config.model.vocab_size)
    model = replace(config.model, vocab_size=rows.total)
    return Workload(
        model=model,
        lora=config.lora,
        trained_embedding=count_trained_embedding(model, config.lora, config.stage.embeddings, rows.added),
        program=describe_program(config.model, config.lora, config.stage, config.hardware),
        tokens=config.hardware.micro_batch_size * config.stage.sequence_length,
        pack_tokens=config.stage.sequence_length,
        strategy=config.hardware.strategy,
        workers=count_devices(config.hardware),
        copies=config.hardware.world_size // config.hardware.shard_workers,
        cpu_offload=config.hardware.cpu_offload,
        checkpointing=config.hardware.activation_checkpointing,
    )


def count_devices(hardware: HardwareConfig) -> int:
    """Workers, or the GPUs that one worker spreads the layers over."""
    if hardware.strategy is Strategy.layers:
        return max(1, hardware.gpus_per_node)
    return hardware.world_size


def count_trained_embedding(model: ModelConfig, lora: LoraConfig, embeddings: Embeddings, added_rows: int) -> int:
    """Trainable numbers of the two embedding matrices."""
    matrices = embedding_matrices(model)
    match embeddings:
        case Embeddings.new_rows:
            return matrices * added_rows * model.hidden_size
        case Embeddings.lora:
            return matrices * lora.rank * (model.vocab_size + model.hidden_size)
        case Embeddings.full:
            return matrices * model.vocab_size * model.hidden_size
    return 0


def describe_program(model: ModelConfig, lora: LoraConfig, stage: StageConfig, hardware: HardwareConfig) -> Program:
    """cqlora's habits under a configuration."""
    on_gpu = hardware.device is Device.cuda
    size = 4 if hardware.precision is Precision.float32 else 2
    fused = fuses_layers(model, lora)
    autocast = size < 4 and not fused
    kernels = fused and hardware.kernels is Kernels.triton
    return Program(
        compute_bytes=size,
        embedding_bytes=size,
        optimizer_bytes=_STATE_BYTES[stage.optimizer] * share_on_device(model, lora, stage.optimizer, hardware),
        dropout=lora.dropout > 0,
        lean_mlp=fused and {"gate_proj", "up_proj", "down_proj"} <= set(adapted_matrices(model, lora)),
        mask_bytes=1 if on_gpu else 4,
        # PEFT asks for CUDA's autocast only, and so casts each layer's input anew under the CPU's.
        adapter_copies_input=autocast and (not on_gpu or lora.method is AdapterMethod.dora),
        # Where documents differ in length, their outputs are kept apart and joined.
        attention_copies=2 if model.attention is Attention.documents else 1,
        # torch's own norm, which goes with the kernels, keeps its input as it is.
        saved_norm_bytes=size if kernels else 4,
        kernels=kernels,
        chunk_tokens=512 if on_gpu else 256,
        logits_peak_bytes=6 if size < 4 else 4,
        casts_adapter=autocast,
        holds_casts=fused and size < 4 and hardware.strategy is not Strategy.fsdp,
        casts_head=size < 4 and stage.embeddings is Embeddings.full,
        gradient_copies=2 if hardware.strategy is Strategy.ddp and hardware.world_size > 1 else 1,
        reserves=on_gpu,
        context=on_gpu,
        in_process=not on_gpu,
    )


def share_on_device(model: ModelConfig, lora: LoraConfig, optimizer: Optimizer, hardware: HardwareConfig) -> float:
    """Share of the adapter's numbers whose moments are on the device between steps."""
    if optimizer not in _PAGED:
        return 1.0
    shards = hardware.shard_workers if hardware.strategy is Strategy.fsdp else 1
    sizes = [
        lora.rank * width / shards
        for matrix in adapted_matrices(model, lora).values()
        for width in (matrix.inputs, matrix.outputs)
    ]
    small = sum(size for size in sizes if size < _PAGED_NUMBERS)
    return small / sum(sizes) if sizes else 0.0


def fuses_layers(model: ModelConfig, lora: LoraConfig) -> bool:
    """Whether every adapted layer is plain enough for the trainer's fused operations."""
    plain = lora.method is not AdapterMethod.dora and lora.dropout == 0
    return plain and model.quantization is not Quantization.int8
