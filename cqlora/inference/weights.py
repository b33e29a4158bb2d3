"""A folder's tensors, mapped from the disk and put together as the decoder wants them."""

from collections.abc import Callable
from pathlib import Path

import torch

from cqlora.errors import ModelError
from cqlora.inference.architecture import Architecture
from cqlora.inference.decoder import Layer, Weights
from cqlora.weights.shards import ShardReader

ReadTensor = Callable[[str], torch.Tensor]
"""A tensor by its name in transformers' LlamaForCausalLM, whole."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_folder(folder: Path, dtype: torch.dtype) -> ReadTensor:
    """A reader of a model folder's tensors in `dtype`."""
    reader = ShardReader(folder)

    def read(name: str) -> torch.Tensor:
        if name not in reader.specs:
            raise ModelError(f"{folder} has no {name}, so it holds no whole LLaMA model; give another folder.")
        return reader.read(name).to(dtype)

    return read


def assemble(architecture: Architecture, read: ReadTensor) -> Weights:
    """All weights, with the matrices joined that are multiplied by the same input."""
    embedding = read(EMBEDDING)
    return Weights(
        embedding=embedding,
        layers=[assemble_layer(f"model.layers.{number}.", read) for number in range(architecture.layers)],
        norm=read("model.norm.weight"),
        head=embedding if architecture.tied else read(HEAD),
    )


def assemble_layer(prefix: str, read: ReadTensor) -> Layer:
    """One block's weights; `prefix` is its name with a dot at the end."""

    def join(*names: str) -> torch.Tensor:
        return torch.cat([read(f"{prefix}{name}.weight") for name in names])

    return Layer(
        attention_norm=read(f"{prefix}input_layernorm.weight"),
        query_key_value=join("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_output=read(f"{prefix}self_attn.o_proj.weight"),
        feed_forward_norm=read(f"{prefix}post_attention_layernorm.weight"),
        gate_up=join("mlp.gate_proj", "mlp.up_proj"),
        down=read(f"{prefix}mlp.down_proj.weight"),
    )
