"""Memory of one worker, part by part and phase by phase, in closed form."""

import math
from dataclasses import dataclass

from cqlora.config.choices import Checkpointing, Quantization, Strategy
from cqlora.plan.activations import backward_per_token, checkpoint_per_token, dequantized, kept_per_token
from cqlora.plan.shapes import (
    adapter_parameters,
    base_parameters,
    block_parameters,
    embedding_matrices,
    largest_matrix,
    vector_parameters,
)
from cqlora.plan.workload import Workload

GIB = 2**30

QUANTIZATION_BLOCK = 64
"""Numbers that share a scale, bitsandbytes' default; with double quantisation 256 scales share another."""

FRAGMENT_SHARE = 0.25
"""What torch's caching allocator loses to fragments and rounding, as a share of what comes and goes.

Weights and states are laid down once and pack tightly; activations, gathered blocks and logits are freed and
asked for again in other sizes, which leaves holes. PyTorch reports both sums (`memory_reserved` and
`memory_allocated`), and published runs that print both put the gap here.
"""

HEAP_SHARE = 0.55
"""What glibc's heap keeps of freed blocks, as a share of what comes and goes in a step on a processor.

Fitted to 26 runs of benchmarks/plan_accuracy.py --cpu. Steps of several passes, and blocks that are computed
again, leave more.
"""
CONTEXT_BYTES = 0.5 * GIB
"""CUDA's context with torch's kernels and cuBLAS's workspaces, which no allocator counts."""

COMMUNICATION_BYTES = 0.1 * GIB
"""NCCL's buffers on a GPU for each GPU of its node, itself included: it keeps some for every peer."""

NODE_PEERS = 8
"""GPUs of a node at most; between nodes only rings cross."""

PROCESS_BYTES = 0.5 * GIB
"""Resident memory of a Python process with torch, transformers, PEFT and bitsandbytes at work."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one worker holds at the worst moment of a step, in bytes."""

    weights: float
    embeddings: float
    adapter: float
    optimizer: float
    gradients: float
    activations: float
    logits: float
    gathered: float
    buffers: float
    allocator: float
    context: float
    loading: float
    """Peak while the base is loaded and quantised."""
    loading_allocated: float
    """Of that, bytes in tensors."""
    save: float
    """Peak while a checkpoint is written."""
    moment: str
    """When in a step the peak is reached: `loss`, `backward`, `rows` or `update`."""

    @property
    def held(self) -> float:
        """Bytes that stay from step to step."""
        return self.weights + self.embeddings + self.adapter + self.optimizer

    @property
    def passing(self) -> float:
        """Bytes that come and go within a step."""
        return self.gradients + self.activations + self.logits + self.gathered + self.buffers

    @property
    def allocated(self) -> float:
        """Bytes in tensors."""
        return self.held + self.passing

    @property
    def reserved(self) -> float:
        """Bytes that torch's allocator keeps."""
        return self.allocated + self.allocator

    @property
    def step(self) -> float:
        """Peak of a step: tensors, the allocator's losses, the context."""
        return self.reserved + self.context

    @property
    def peak(self) -> float:
        """The largest of the three phases."""
        return max(self.loading, self.step, self.save)


def estimate(work: Workload) -> Estimate:
    """The memory of one worker of `work`."""
    held = _held(work)
    passing, moment = _passing(work)
    context = _context(work)
    fragments = FRAGMENT_SHARE if work.program.reserves else 0.0
    heap = HEAP_SHARE * sum(passing.values()) if work.program.in_process else 0.0
    at_rest = sum(held.values()) + context
    loaded = max(sum(held.values()), _while_sharding(work, held["weights"]))
    buffers = _loading_buffers(work)
    loading = (1 + fragments) * buffers
    return Estimate(
        **held,
        **passing,
        allocator=_allocator_losses(passing, loading, fragments) + (1 + fragments) * _staged_before(work) + heap,
        context=context,
        loading=loaded + context + loading,
        loading_allocated=loaded + buffers,
        save=at_rest + _saving_buffers(work),
        moment=moment,
    )


def trainable_parameters(work: Workload) -> int:
    """Trainable numbers of the whole run."""
    return adapter_parameters(work.model, work.lora) + work.trained_embedding if work.training else 0


def packed_bytes(work: Workload, parameters: int) -> tuple[float, float]:
    """Bytes of quantised numbers and of their constants."""
    match work.model.quantization:
        case Quantization.none:
            return parameters * work.program.compute_bytes, 0.0
        case Quantization.int8:
            return parameters, 4 * parameters / work.model.hidden_size
        case Quantization.nf4:
            scale_bytes = 1 + 4 / 256 if work.model.double_quantization else 4
            return parameters / 2, parameters / QUANTIZATION_BLOCK * scale_bytes


def _held(work: Workload) -> dict[str, float]:
    packed, constants = packed_bytes(work, _own_blocks(work) * block_parameters(work.model))
    vectors = vector_parameters(work.model) * work.program.embedding_bytes
    share = 0.0 if work.cpu_offload else 1 / work.shards
    trained = trainable_parameters(work) * _own_share(work)
    return {
        "weights": (packed + vectors) * share + constants,
        "embeddings": _own_embeddings(work) * share,
        "adapter": trained * work.program.adapter_bytes * share,
        "optimizer": trained * work.program.optimizer_bytes * share,
    }


def _own_blocks(work: Workload) -> int:
    """Blocks on one device."""
    spread = work.workers if work.strategy is Strategy.layers else 1
    return math.ceil(work.model.num_hidden_layers / spread)


def _own_share(work: Workload) -> float:
    """Share of all blocks that is on one device."""
    return _own_blocks(work) / work.model.num_hidden_layers


def _own_embeddings(work: Workload) -> float:
    """Bytes of the input embedding and of the output projection on one device."""
    numbers = work.model.vocab_size * work.model.hidden_size
    first = numbers * work.program.embedding_bytes
    # `layers` puts the one on the first device and the other on the last.
    if embedding_matrices(work.model) == 1 or (work.strategy is Strategy.layers and work.workers > 1):
        return first
    return first + (sum(packed_bytes(work, numbers)) if work.program.quantizes_head else first)


def _passing(work: Workload) -> tuple[dict[str, float], str]:
    """Memory that comes and goes within a step, by part, at the step's worst moment."""
    if not work.training:
        return dict.fromkeys(("gradients", "activations", "logits", "gathered", "buffers"), 0.0), "loading"
    moments = {
        "loss": _at_loss(work),
        "backward": _at_backward(work),
        "rows": _at_rows(work),
        "update": _at_update(work),
    }
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    return moments[worst], worst


def _at_loss(work: Workload) -> dict[str, float]:
    """Every block has run forward; the logits exist and the backward pass has not begun."""
    program = work.program
    # The last hidden states around the final norm, and their gradient in float32.
    states = work.tokens * work.model.hidden_size * (program.compute_bytes + program.saved_norm_bytes + 4)
    return {
        "gradients": _gradients(work),
        "activations": _kept_activations(work) + states,
        "logits": _logits(work, program.logits_peak_bytes),
        "gathered": _gathered(work),
        "buffers": _adapter_casts(work) + _head_cast(work),
    }


def _at_backward(work: Workload) -> dict[str, float]:
    """The last block runs backward: recomputed, its matrices dequantised, all others still kept."""
    model, program = work.model, work.program
    live = backward_per_token(model, program)
    if work.checkpointing is Checkpointing.full:
        live += kept_per_token(model, work.lora, program)
        # The block's input is kept already.
        live -= checkpoint_per_token(model, program) * program.kernels
    matrix = 0 if model.quantization is Quantization.none else dequantized(model, work.lora, program)
    return {
        "gradients": _gradients(work),
        "activations": _kept_activations(work) + work.tokens * live,
        "logits": _logits(work, program.logits_kept_bytes),
        "gathered": _gathered(work),
        "buffers": matrix + _adapter_casts(work),
    }


def _at_rows(work: Workload) -> dict[str, float]:
    """The input embedding's gradient, whole though only some rows train, at the end of the backward pass."""
    rows = work.model.vocab_size * work.model.hidden_size * work.program.embedding_bytes
    return {
        "gradients": _gradients(work),
        "activations": work.tokens * checkpoint_per_token(work.model, work.program),
        "logits": 0.0,
        "gathered": _gathered(work),
        "buffers": 2.0 * rows if work.trained_embedding else 0.0,
    }


def _at_update(work: Workload) -> dict[str, float]:
    """The optimizer steps; no activation is left."""
    trained = trainable_parameters(work) * work.program.adapter_bytes / work.shards
    return {
        "gradients": _gradients(work),
        "activations": 0.0,
        "logits": 0.0,
        "gathered": _gathered_root(work),
        "buffers": 0.0 if work.cpu_offload else work.program.optimizer_temporaries * trained,
    }


def _gradients(work: Workload) -> float:
    whole = trainable_parameters(work) * work.program.adapter_bytes * work.program.gradient_copies
    return 0.0 if work.cpu_offload else whole * _own_share(work) / work.shards


def _kept_activations(work: Workload) -> float:
    """What all blocks of this device keep at the end of the forward pass."""
    if work.checkpointing is Checkpointing.full:
        per_token = 0 if work.offload_activations else checkpoint_per_token(work.model, work.program)
    else:
        per_token = kept_per_token(work.model, work.lora, work.program)
    return work.tokens * _own_blocks(work) * per_token


def _adapter_casts(work: Workload) -> float:
    """The adapter in the compute type: all of it while every block's graph or a step lives, else one block's."""
    cast = adapter_parameters(work.model, work.lora) * work.program.compute_bytes
    if work.program.holds_casts:
        return cast * _own_share(work)
    if not work.program.casts_adapter:
        return 0.0
    blocks = _own_blocks(work) if work.checkpointing is Checkpointing.none else 1
    return cast * blocks / work.model.num_hidden_layers


def _head_cast(work: Workload) -> float:
    """The output projection in the compute type, while the logits are made of it."""
    numbers = work.model.vocab_size * work.model.hidden_size
    return float(numbers * work.program.compute_bytes) if work.program.casts_head else 0.0


def _logits(work: Workload, bytes_each: int) -> float:
    positions = min(work.tokens, work.program.chunk_tokens or work.tokens)
    return positions * work.model.vocab_size * bytes_each


def _gathered(work: Workload) -> float:
    """Whole blocks that a sharded model holds beside its shards."""
    if work.shards == 1:
        return 0.0
    units = _gathered_units(work) * _unit(work)
    # An offloaded shard is copied to the device, and let go once it is gathered.
    staged = _unit(work) / work.shards if work.cpu_offload else 0.0
    return units + staged + _gathered_root(work)


def _unit(work: Workload) -> float:
    """A block as it is gathered."""
    packed, _ = packed_bytes(work, block_parameters(work.model))
    adapter = adapter_parameters(work.model, work.lora) * work.program.adapter_bytes
    return packed + adapter / work.model.num_hidden_layers


def _gathered_units(work: Workload) -> int:
    """Blocks that are whole at once: the one at work and the next."""
    return work.model.num_hidden_layers if work.program.keeps_units else 2


def _staged_before(work: Workload) -> float:
    """Shards that were copied to the device before the present one: let go, and kept by the allocator."""
    if work.shards == 1 or not work.cpu_offload:
        return 0.0
    return ((_gathered_units(work) - 1) * _unit(work) + _gathered_root(work)) / work.shards


def _gathered_root(work: Workload) -> float:
    """Embeddings and output projection of a sharded model stay whole through a step."""
    return 0.0 if work.shards == 1 else _own_embeddings(work)


def _allocator_losses(passing: dict[str, float], loading: float, fragments: float) -> float:
    """What the caching allocator reserves beyond tensors: fragments, and what loading left unfilled.

    Memory is pooled by CUDA stream. Blocks are gathered on a stream of their own, so what was freed after
    loading serves activations and logits, never gathered blocks.
    """
    if not fragments:
        return 0.0
    own_stream = sum(passing.values()) - passing["gathered"]
    unfilled = max(0.0, loading - (1 + fragments) * own_stream)
    return fragments * sum(passing.values()) + unfilled


def _loading_buffers(work: Workload) -> float:
    """The largest tensor as read and as quantisation lays it out; units copied flat where FSDP1 does so."""
    model, program = work.model, work.program
    if program.in_process:
        # The mapped file of 16-bit weights counts as resident while it is read; widened to float32, what was
        # freed leaves about as much in the heap.
        return base_parameters(model) * (2.0 if program.compute_bytes == 2 else 4.0)
    quantized = model.quantization is not Quantization.none
    largest = max(largest_matrix(model), model.vocab_size * model.hidden_size if program.quantizes_head else 0)
    converted = 2 * largest * program.compute_bytes if quantized else 0
    if not program.flattens_units or work.strategy not in (Strategy.fsdp, Strategy.ddp):
        return converted
    packed, _ = packed_bytes(work, block_parameters(model))
    return max(converted, 2 * (_own_embeddings(work) + packed))


def _while_sharding(work: Workload, weights: float) -> float:
    """Tensors of a GPU whose blocks are read and sharded one by one; `weights` is what it holds of them in the end.

    Until the last block is sharded the embeddings are whole, and so is the adapter of each block that is to come.
    """
    if work.shards == 1 or work.program.flattens_units or not work.program.reserves:
        return 0.0
    block = sum(packed_bytes(work, block_parameters(work.model)))
    adapter = trainable_parameters(work) * work.program.adapter_bytes
    share = 0.0 if work.cpu_offload else 1 / work.shards
    return _own_embeddings(work) + block + max(adapter, adapter * share + weights)


def _saving_buffers(work: Workload) -> float:
    """On a GPU one gathered tensor; on the host the states as they are and as the bytes of a file."""
    if work.program.context:
        largest = max(work.lora.rank * work.model.intermediate_size, work.trained_embedding)
        return float(largest * work.program.adapter_bytes) if work.training and work.shards > 1 else 0.0
    return trainable_parameters(work) * 2 * work.program.optimizer_bytes


def _context(work: Workload) -> float:
    if not work.program.context:
        return PROCESS_BYTES if work.program.in_process else 0.0
    peers = min(work.workers, NODE_PEERS) if work.workers > 1 else 0
    return CONTEXT_BYTES + COMMUNICATION_BYTES * peers
