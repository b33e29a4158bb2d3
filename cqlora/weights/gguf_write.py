"""A model written as one GGUF file that llama.cpp runs, a matrix at a time.

Names and layout as llama.cpp's convert_hf_to_gguf.py gives them: vectors in float32, matrices in float16 or
Q8_0, the query and key rows in the order of neighbours where llama.cpp's architecture rotates neighbours.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cqlora.architectures import Part, find_head_dim, find_unrotated_layers, require_known
from cqlora.config.choices import GgufType
from cqlora.errors import ModelError
from cqlora.positions import read_rope
from cqlora.system.model_config import DERIVED
from cqlora.system.shards import TensorSource, TensorSpec
from cqlora.weights.gguf import LAYER_NAMES, NAMES, ROPE_FACTORS, llama3_rope_factors
from cqlora.weights.gguf_vocabulary import add_vocabulary
from cqlora.weights.rotary import halves_to_interleaved

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
"""llama.cpp's name of the architecture that computes a model_type."""
_ROTATES_NEIGHBOURS = ("llama", "smollm3")
"""Architectures of llama.cpp that rotate neighbours of a head's dimensions; the others rotate halves."""
_STEP_WITHOUT_ROTARY = 4
"""llama.cpp leaves every fourth layer of a smollm3 without rotary embedding; no field of the file says otherwise."""
_YARN_KEYS = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GGUF_NAMES = {theirs: ours for ours, theirs in NAMES.items()}
_GGUF_LAYER_NAMES = {theirs: ours for ours, theirs in LAYER_NAMES.items()} | _HEAD_NORMS


def write_gguf(
    file: Path, source: TensorSource, config: dict[str, Any], tokenizer: Path, kind: GgufType, template: str = ""
) -> None:
    """Write `source` with the shape that `config` (config.json) says and the tokenizer of a model folder.

    `template` is the chat template where it is not that folder's own.

    Raises:
        ModelError: another kind of model; a tensor, a tokenizer, a rotary scaling or layers without rotary embedding
            that llama.cpp's architecture does not have, or numbers that float16 cannot hold.
    """
    require_known(Part.gguf, config, tokenizer)
    check_rotary_layers(config, tokenizer)
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise ModelError("format=gguf needs the package gguf; pip install 'cqlora[gguf]'.") from error
    writer = GGUFWriter(None, ARCHITECTURES[config["model_type"]])
    writer.add_name(file.name.removesuffix(f".{kind.value}.gguf"))
    add_shape(writer, config, kind)
    add_vocabulary(writer, tokenizer, config, template)
    tensors = {gguf_name(name): spec for name, spec in source.specs.items() if not name.endswith(DERIVED)}
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for name, spec in tensors.items():
        stored = storage_shape(spec, kind)
        dtype, raw = storage_type(spec, kind)
        writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, raw_dtype=raw)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for spec in tensors.values():
        writer.write_tensor_data(gather(source, spec, config, kind))
    writer.close()


def add_shape(writer: Any, config: dict[str, Any], kind: GgufType) -> None:
    """The model's shape under GGUF's names."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    heads = config["num_attention_heads"]
    writer.add_file_type(LlamaFileType.MOSTLY_F16 if kind is GgufType.f16 else LlamaFileType.MOSTLY_Q8_0)
    if kind is not GgufType.f16:
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(find_head_dim(config))
    writer.add_value_length(find_head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(find_head_dim(config))
    rope = rope_parameters(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(original))


def check_rotary_layers(config: dict[str, Any], folder: Path) -> None:
    """Raise ModelError where a smollm3 leaves other layers without rotary embedding than llama.cpp does."""
    fourth = range(_STEP_WITHOUT_ROTARY - 1, config["num_hidden_layers"], _STEP_WITHOUT_ROTARY)
    if config["model_type"] == "smollm3" and find_unrotated_layers(config) != list(fourth):
        raise ModelError(
            f"{folder} leaves other layers than every fourth without rotary embedding, which a GGUF file cannot say; "
            "use format=safetensors."
        )


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's kind, base and scaling.

    Raises:
        ModelError: a scaling that llama.cpp's architecture does not compute.
    """
    rope = read_rope(config)
    kind, architecture = rope["rope_type"], ARCHITECTURES[config["model_type"]]
    # Only this architecture reads the tensor that holds llama3's scaling.
    known = ("default", "linear", "yarn", "llama3") if architecture == "llama" else ("default", "linear", "yarn")
    if kind not in known:
        raise ModelError(
            f"format=gguf cannot hold rotary scaling {kind} of a {config['model_type']} model; use format=safetensors."
        )
    if kind == "yarn" and (own := sorted(key for key in rope.keys() - _YARN_KEYS if rope[key] is not None)):
        raise ModelError(
            f"format=gguf holds yarn with the bounds of its paper, and this model has {own[0]}={rope[own[0]]}; "
            "use format=safetensors."
        )
    return rope


def rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """Llama 3.1's scaling, which a GGUF file holds as a tensor; None for a model without it."""
    rope = rope_parameters(config)
    return (
        llama3_rope_factors(rope, find_head_dim(config)).astype(np.float32) if rope["rope_type"] == "llama3" else None
    )


def gguf_name(name: str) -> str:
    """A tensor's name in a GGUF file."""
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    parts = name.split(".")
    module = ".".join(parts[3:-1])
    if parts[:2] != ["model", "layers"] or parts[-1] not in ("weight", "bias") or module not in _GGUF_LAYER_NAMES:
        raise ModelError(f"format=gguf has no place for {name}; use format=safetensors.")
    return f"blk.{parts[2]}.{_GGUF_LAYER_NAMES[module]}.{parts[-1]}"


def storage_type(spec: TensorSpec, kind: GgufType) -> tuple[np.dtype[Any], Any]:
    """numpy's and ggml's type of a tensor in the file."""
    from gguf import GGMLQuantizationType

    if len(spec.shape) < 2:
        return np.dtype(np.float32), GGMLQuantizationType.F32
    if kind is GgufType.f16:
        return np.dtype(np.float16), GGMLQuantizationType.F16
    return np.dtype(np.uint8), GGMLQuantizationType.Q8_0


def storage_shape(spec: TensorSpec, kind: GgufType) -> tuple[int, ...]:
    """A tensor's shape in the file, of Q8_0 in bytes: 34 for 32 numbers."""
    if len(spec.shape) < 2 or kind is GgufType.f16:
        return spec.shape
    if spec.shape[1] % 32:
        raise ModelError(f"gguf_type=q8_0 needs rows of a multiple of 32 and {spec.name} has {spec.shape[1]}; use f16.")
    return (spec.shape[0], spec.shape[1] // 32 * 34)


def gather(source: TensorSource, spec: TensorSpec, config: dict[str, Any], kind: GgufType) -> np.ndarray:
    """A tensor as it stands in the file."""
    dtype, _ = storage_type(spec, kind)
    stored = np.empty(storage_shape(spec, kind), dtype)
    first = 0
    for rows in encode_rows(source, spec, kind):
        stored[first : first + len(rows)] = rows
        first += len(rows)
    rotates_neighbours = ARCHITECTURES[config["model_type"]] in _ROTATES_NEIGHBOURS
    if rotates_neighbours and spec.name.endswith(("q_proj.weight", "k_proj.weight")):
        # Each row is stored by itself, so they may be put into llama.cpp's order afterwards.
        return halves_to_interleaved(torch.from_numpy(stored), find_head_dim(config)).numpy()
    return stored


def encode_rows(source: TensorSource, spec: TensorSpec, kind: GgufType) -> Iterator[np.ndarray]:
    """A tensor's rows in the file's type."""
    from gguf.quants import quantize

    dtype, raw = storage_type(spec, kind)
    for block in source.blocks(spec.name):
        rows = block.float().numpy()
        yield quantize(rows, raw) if dtype == np.uint8 else narrow(rows, dtype, spec.name)


def narrow(rows: np.ndarray, dtype: np.dtype[Any], name: str) -> np.ndarray:
    """float32 rows in the file's type; ModelError where a number does not fit."""
    with np.errstate(over="ignore"):
        narrowed: np.ndarray = rows.astype(dtype)
    if not np.isfinite(narrowed).all():
        raise ModelError(f"{name} does not fit in float16; use gguf_type=q8_0 or format=safetensors.")
    return narrowed
