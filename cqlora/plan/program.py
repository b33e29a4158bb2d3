"""What a training program holds in memory and in which types: cqlora's own, or another's as an option set.

Every option is something that can be read in a program's source; none is fitted to a figure.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """Habits of a training program. The defaults are cqlora's on a GPU."""

    compute_bytes: int = 2
    """Of one number of what matrix products read and write: 2 in bfloat16, 4 in float32."""
    adapter_bytes: int = 4
    """Of one trainable number and of its gradient."""
    optimizer_bytes: float = 8
    """Of AdamW's two moments for one trainable number, on the device."""
    embedding_bytes: int = 2
    """Of one number of the embeddings and of the output projection."""
    quantizes_head: bool = False
    """The output projection is quantised like a block's layers."""
    saved_norm_bytes: int = 4
    """Of one number of a norm's input as it is kept; the norms of transformers compute in float32."""
    adapter_copies_input: bool = False
    """Each adapted layer keeps a copy of its input, rather than the one that its neighbours share."""
    dropout: bool = False
    """Adapters drop out: each adapted layer keeps its thinned input and a mask."""
    mask_bytes: int = 1
    """Of one number of a dropout mask: a byte on a GPU, a float32 factor on a CPU."""
    repeats_keys: bool = False
    """Keys and values of grouped queries are repeated to full width before attention."""
    fused_projections: bool = False
    """Queries, keys and values are views of one tensor, which the values that attention keeps hold whole."""
    lean_mlp: bool = False
    """The feed-forward block keeps its gate and up projections and makes the rest again."""
    kernels: bool = False
    """A norm keeps its input itself, and one kernel makes the gradients of gate and up projection, one of them in the
    place of the product's."""
    attention_copies: int = 1
    """Times that the attention's output is kept."""
    keeps_quantized_inputs: bool = False
    """Quantised layers keep their input though they are frozen (bitsandbytes before 0.42)."""
    chunk_tokens: int = 512
    """Positions whose logits exist at once; 0 is all."""
    logits_peak_bytes: int = 6
    """Per position and token of the vocabulary at the loss: float32 logits, and their slopes in 16 bits."""
    logits_kept_bytes: int = 0
    """Of those, what stays while the blocks run backward."""
    flattens_units: bool = False
    """Wrapping copies each unit's parameters into one flat tensor before it is split (FSDP1)."""
    keeps_units: bool = False
    """Blocks once gathered stay whole until the step ends."""
    gradient_copies: int = 1
    """Times that gradients are held: 2 where DDP's buckets are copies."""
    casts_adapter: bool = False
    """Autocast makes a copy of each adapter matrix in the compute type, which the graph holds."""
    holds_casts: bool = False
    """A copy of the whole adapter in the compute type lasts while a step's micro batches run."""
    casts_head: bool = False
    """The output projection trains whole in float32 and is copied to the compute type at the loss."""
    optimizer_temporaries: int = 0
    """Copies of the trainable parameters that a step of the optimizer makes; a fused one makes none."""
    reserves: bool = True
    """Memory is counted as torch's caching allocator reserves it, with what it loses to fragments."""
    in_process: bool = False
    """The figure is a process's resident memory, Python and its libraries among it, as on a CPU."""
    context: bool = True
    """The figure includes what lies outside torch's allocator: CUDA's context, cuBLAS, NCCL."""
