"""A GGUF file of the LLaMA architecture, read as a Hugging Face model, a few rows at a time.

Format and names: ggml's docs/gguf.md and llama.cpp's convert_hf_to_gguf.py. Quantised matrices are widened by
the `gguf` package; the query and key rows come in llama.cpp's order and are put back in Hugging Face's.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cqlora.errors import ModelError
from cqlora.system.documents import first_words
from cqlora.system.model_config import INPUT, OUTPUT, check_config, check_tensors
from cqlora.system.shards import BLOCK_BYTES, DTYPES, TensorSpec
from cqlora.weights.gguf_header import check_header
from cqlora.weights.rotary import base_frequencies, interleaved_to_halves, scale_frequencies

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {
    "token_embd.weight": INPUT,
    "output_norm.weight": "model.norm.weight",
    "output.weight": OUTPUT,
}
ROPE_FACTORS = "rope_freqs.weight"


class GgufModel:
    """The tensors and the configuration of a GGUF file; a TensorSource.

    Matrices are given in float16, which holds what a quantised block stands for to 11 bits; a file in
    bfloat16 stays in it.
    """

    def __init__(self, file: Path) -> None:
        """Read the file's header.

        Raises:
            ModelError: a file that cannot be read, or that is of another architecture than LLaMA.
        """
        self.file = file
        if not file.is_file():
            raise ModelError(f"{file} is no plain file; give a GGUF file.")
        reader = _open(file)
        self._fields = reader.fields
        self._tensors = {}
        self._rope_factors: np.ndarray | None = None
        with described_as_damage(file):
            architecture = self.field("general.architecture", "")
        if architecture != "llama":
            raise ModelError(f"{file} holds a model of architecture {architecture!r}; use a GGUF file of a LLaMA.")
        for tensor in reader.tensors:
            if tensor.name == ROPE_FACTORS:
                self._rope_factors = tensor.data
                continue
            if not all(tensor.shape.tolist()):
                raise ModelError(f"{file} holds {tensor.name} without a number in it; fetch it again.")
            self._tensors[_rename(file, tensor.name)] = tensor
        kept_in_bf16 = any(tensor.tensor_type.name == "BF16" for tensor in reader.tensors)
        self.dtype = "BF16" if kept_in_bf16 else "F16"
        self.specs = {
            name: TensorSpec(name, self.dtype, tuple(int(size) for size in reversed(tensor.shape)))
            for name, tensor in self._tensors.items()
        }

    def field(self, key: str, default: Any = None) -> Any:
        """A metadata value by its GGUF name."""
        return self._fields[key].contents() if key in self._fields else default

    def needed(self, key: str) -> Any:
        """A metadata value that must be there.

        Raises:
            ModelError: it is not.
        """
        if key not in self._fields:
            raise ModelError(f"{self.file} has no {key}; give a GGUF file with a whole tokenizer.")
        return self.field(key)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's rows in Hugging Face's order, widened about 64 MiB at a time."""
        tensor, spec = self._tensors[name], self.specs[name]
        heads = self._heads_of(name)
        row_bytes = 4 * spec.shape[-1]
        multiple = self.head_dim if heads else 1
        rows = max(multiple, BLOCK_BYTES // row_bytes // multiple * multiple)
        for start in range(0, spec.shape[0], rows):
            block = _widen(tensor, slice(start, start + rows))
            if heads:
                block = interleaved_to_halves(block, self.head_dim)
            narrow = block.to(DTYPES[self.dtype])
            if not torch.isfinite(narrow).all():
                raise ModelError(f"{self.file}: {name} does not fit in float16; use a bfloat16 GGUF of this model.")
            yield narrow

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        declared = self.field("llama.rope.dimension_count")
        return int(declared or self.field("llama.embedding_length") // self.field("llama.attention.head_count"))

    def config(self) -> dict[str, Any]:
        """The model's `config.json`, which asks for the tensors that are there.

        Raises:
            ModelError: a field is missing or of another type, or the tensors are of another model.
        """
        with described_as_damage(self.file):
            config = self._read_config()
        check_config(config, self.file)
        check_tensors(config, {name: spec.shape for name, spec in self.specs.items()}, self.file)
        return config

    def _read_config(self) -> dict[str, Any]:
        heads = int(self.field("llama.attention.head_count"))
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": {"F16": "float16", "BF16": "bfloat16"}[self.dtype],
            "vocab_size": self.specs[INPUT].shape[0],
            "hidden_size": int(self.field("llama.embedding_length")),
            "intermediate_size": int(self.field("llama.feed_forward_length")),
            "num_hidden_layers": int(self.field("llama.block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self.field("llama.attention.head_count_kv", heads)),
            "head_dim": self.head_dim,
            "max_position_embeddings": int(self.field("llama.context_length")),
            "rms_norm_eps": round(float(self.field("llama.attention.layer_norm_rms_epsilon")), 10),
            "rope_parameters": self._rope_parameters(),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": OUTPUT not in self.specs,
            "use_cache": True,
        }
        return config | self.special_ids()

    def special_ids(self) -> dict[str, int]:
        """Ids of the begin, end and padding tokens, as the file declares them."""
        ids = {f"{kind}_token_id": self.field(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
        ids["pad_token_id"] = self.field("tokenizer.ggml.padding_token_id")
        return {key: int(value) for key, value in ids.items() if value is not None}

    def _heads_of(self, name: str) -> bool:
        return name.endswith(("q_proj.weight", "k_proj.weight"))

    def _rope_parameters(self) -> dict[str, Any]:
        theta = float(self.field("llama.rope.freq_base", 10000.0))
        scaling = self.field("llama.rope.scaling.type", "none")
        if scaling in ("linear", "yarn"):
            parameters = {"rope_type": scaling, "rope_theta": theta}
            parameters["factor"] = float(self.field("llama.rope.scaling.factor", 1.0))
            if scaling == "yarn":
                original = self.field("llama.rope.scaling.original_context_length")
                parameters["original_max_position_embeddings"] = int(original or self.field("llama.context_length"))
            return parameters
        if scaling != "none":
            raise ModelError(f"{self.file} scales its positions by {scaling}; convert the raw weights.")
        if self._rope_factors is None:
            return {"rope_type": "default", "rope_theta": theta}
        parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": float(self._rope_factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        expected = llama3_rope_factors(parameters, self.head_dim)
        if not np.allclose(self._rope_factors, expected, rtol=1e-3):
            raise ModelError(f"{self.file} scales its rotary frequencies in an unknown way; convert the raw weights.")
        return parameters


@contextmanager
def described_as_damage(file: Path) -> Iterator[None]:
    """Say in one sentence that a GGUF file is damaged, where a field is not what it must be."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{file} has a field that cannot be read ({first_words(error)}); fetch it again.") from error


def llama3_rope_factors(parameters: dict[str, Any], head_dim: int) -> np.ndarray:
    """By what Llama 3.1 divides each rotary frequency, float64 [head_dim / 2]."""
    frequencies = base_frequencies(parameters, head_dim, torch.float64)
    scaled = scale_frequencies(parameters, frequencies, parameters["original_max_position_embeddings"])
    factors: np.ndarray = (frequencies / scaled).numpy()
    return factors


def _open(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(f"reading {file.name} needs the package gguf; pip install 'cqlora[gguf]'.") from error
    try:
        check_header(file)
        with np.errstate(all="ignore"):
            return GGUFReader(file)
    except Exception as error:  # the package says nothing of what a damaged file ends in
        raise ModelError(f"{file} cannot be read as a GGUF file ({first_words(error)}); fetch it again.") from error


def _rename(file: Path, name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in LAYER_NAMES:
        raise ModelError(f"{file} holds the tensor {name}, which a LLaMA does not have; use another file.")
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"


def _widen(tensor: Any, rows: slice) -> torch.Tensor:
    from gguf.quants import dequantize

    widened = dequantize(np.ascontiguousarray(tensor.data[rows]), tensor.tensor_type)
    return torch.from_numpy(np.array(widened, dtype=np.float32))
