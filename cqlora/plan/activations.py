"""Bytes that the forward pass keeps for the backward pass, a tensor at a time.

Which tensors autograd keeps is read off the formulas of their gradients (Korthikanti et al. 2022, 2205.05198,
section 4.1, does so for GPT). A frozen layer keeps no input: its weight asks for no gradient. Only an adapted
one does.
"""

from cqlora.config.choices import AdapterMethod
from cqlora.config.schema import LoraConfig, ModelConfig
from cqlora.plan.program import Program
from cqlora.plan.shapes import adapted_matrices, key_size, largest_matrix, query_size

_ATTENTION_INPUT = ("q_proj", "k_proj", "v_proj")
_MLP_INPUT = ("gate_proj", "up_proj")


def kept_per_token(model: ModelConfig, lora: LoraConfig, program: Program) -> int:
    """Bytes that one block keeps of one token when nothing is recomputed."""
    hidden, wide, size = model.hidden_size, model.intermediate_size, program.compute_bytes
    norms = 2 * (program.saved_norm_bytes * hidden + 4)
    attention = _kept_by_attention(model, program)
    # silu keeps its input, and the product of gate and up keeps both factors.
    mlp = (2 if program.lean_mlp else 3) * size * wide
    inputs = (
        _kept_input(_ATTENTION_INPUT, hidden, model, lora, program)
        + _kept_input(("o_proj",), query_size(model), model, lora, program, already_kept=True)
        + _kept_input(_MLP_INPUT, hidden, model, lora, program)
        + _kept_input(("down_proj",), wide, model, lora, program) * (not program.lean_mlp)
    )
    return norms + attention + mlp + inputs + _kept_by_adapters(model, lora, program)


def _kept_by_attention(model: ModelConfig, program: Program) -> int:
    """Rotated queries and keys, values, the output, and a float32 log-sum of exponentials per head.

    Where the heads are normalised, queries and keys before that too, with a float32 root mean square of each.
    """
    queries = query_size(model)
    keys = queries if program.repeats_keys else key_size(model)
    numbers = queries + 2 * keys + program.attention_copies * queries
    if program.fused_projections:
        numbers += queries + key_size(model)
    heads = model.num_attention_heads
    normed = program.saved_norm_bytes * (queries + keys) + 4 * (heads + model.num_key_value_heads)
    return program.compute_bytes * numbers + 4 * heads + normed * model.head_norms


def _kept_input(
    layers: tuple[str, ...],
    width: int,
    model: ModelConfig,
    lora: LoraConfig,
    program: Program,
    already_kept: bool = False,
) -> int:
    """Bytes of the input that `layers` share, kept for the gradients of those that carry an adapter."""
    adapted = len(set(layers) & set(adapted_matrices(model, lora)))
    size = program.compute_bytes
    shared = 0 if already_kept else size * width
    frozen_copy = shared if program.keeps_quantized_inputs else 0
    if not adapted:
        return frozen_copy
    if program.dropout:
        return frozen_copy + adapted * (size + program.mask_bytes) * width
    if program.adapter_copies_input:
        return frozen_copy + adapted * size * width
    return max(shared, frozen_copy)


def _kept_by_adapters(model: ModelConfig, lora: LoraConfig, program: Program) -> int:
    """The products x·A of each adapted layer; DoRA keeps the layer's output too, to scale it."""
    adapted = adapted_matrices(model, lora).values()
    numbers = lora.rank * len(adapted)
    if lora.method is AdapterMethod.dora:
        numbers += sum(matrix.outputs for matrix in adapted)
    return program.compute_bytes * numbers


def backward_per_token(model: ModelConfig, program: Program) -> int:
    """Bytes of one token's gradients that exist at once while a block runs backward.

    The worst moment is the MLP's: the gradients of the down layer's input (from the frozen matrix and from
    the adapter, before they are added) and of one factor, at the intermediate size, and of both factors and a
    remade activation where the block is lean, unless one kernel makes them and writes over what it reads; at the
    hidden size the residual stream's gradient and the one being added to it.
    """
    wide = 4 if program.lean_mlp and not program.kernels else 3
    return program.compute_bytes * (wide * model.intermediate_size + 2 * model.hidden_size)


def dequantized(model: ModelConfig, lora: LoraConfig, program: Program) -> int:
    """Bytes of the matrix that is dequantised at the moment; DoRA also forms B·A and their sum."""
    copies = 3 if lora.method is AdapterMethod.dora else 1
    return copies * program.compute_bytes * largest_matrix(model)


def checkpoint_per_token(model: ModelConfig, program: Program) -> int:
    """Bytes of one block's input, which is what full checkpointing keeps of it."""
    return program.compute_bytes * model.hidden_size
