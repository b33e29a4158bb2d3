"""Meta's raw checkpoints, read as Hugging Face's tensors, whatever their shape.

A checkpoint is `params.json` and `consolidated.NN.pth`, one file per model-parallel rank. Column-parallel
matrices (wq, wk, wv, w1, w3, output) are cut along their rows, row-parallel ones (wo, w2) along columns, the
embedding along its columns (LLaMA, Llama 2) or rows (Llama 3), norms are in every file (model.py of
meta-llama/llama and of meta-llama/llama-models).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cqlora.errors import ModelError
from cqlora.system.documents import read_object, shorten, take, take_number
from cqlora.system.model_config import INPUT, OUTPUT
from cqlora.system.shards import BLOCK_BYTES, TensorSpec, dtype_name, split_rows
from cqlora.weights.rotary import interleaved_to_halves

_NAMES = {
    "tok_embeddings.weight": INPUT,
    "norm.weight": "model.norm.weight",
    "output.weight": OUTPUT,
}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_ROPE_TABLE = re.compile(r"(.*\.)?rope\.freqs")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")


@dataclass(frozen=True, slots=True)
class MetaParams:
    """`params.json`, with what Meta's code assumes where it says nothing."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    rope_theta: float
    use_scaled_rope: bool
    rope_scaling_factor: float | None
    states_kv_heads: bool
    """Whether params.json says n_kv_heads or an ffn_dim_multiplier, which LLaMA's never do."""

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.dim // self.n_heads


def read_params(folder: Path) -> MetaParams:
    """Read a checkpoint's params.json.

    Raises:
        ModelError: the file is missing, is no JSON or lacks a size.
    """
    file = folder / "params.json"
    if not file.is_file():
        raise ModelError(f"{file} does not exist; give input_dir=FOLDER of Meta's files, or its parent and model_size.")
    document = read_object(file)
    stated = take(document, "model", file, dict, default=document)
    n_heads = take_number(stated, "n_heads", file, 1, 1 << 16)
    params = MetaParams(
        dim=take_number(stated, "dim", file, 1, 1 << 20),
        n_layers=take_number(stated, "n_layers", file, 1, 10_000),
        n_heads=n_heads,
        n_kv_heads=take_number(stated, "n_kv_heads", file, 1, 1 << 16, default=n_heads),
        norm_eps=float(take_number(stated, "norm_eps", file, 1e-12, 1.0, float)),
        rope_theta=float(take_number(stated, "rope_theta", file, 1e-6, 1e12, float, default=10000.0)),
        use_scaled_rope=take(stated, "use_scaled_rope", file, bool, default=False),
        rope_scaling_factor=take_number(stated, "rope_scaling_factor", file, 1e-6, 1e12, float, default=None),
        states_kv_heads=stated.get("n_kv_heads") is not None or "ffn_dim_multiplier" in stated,
    )
    if params.dim % (2 * n_heads) or n_heads % params.n_kv_heads:
        raise ModelError(
            f"{file} says dim={params.dim}, n_heads={n_heads}, n_kv_heads={params.n_kv_heads}, which do not divide; "
            "fetch it again."
        )
    return params


class MetaCheckpoint:
    """The tensors of a Meta checkpoint in Hugging Face's names and order; a TensorSource."""

    def __init__(self, folder: Path) -> None:
        """Map the files into memory and compare their shapes with params.json.

        Raises:
            ModelError: a file that is missing, truncated, surplus or of another shape than params.json says.
        """
        self.folder = folder
        self.params = read_params(folder)
        self.files = list_shards(folder)
        self.parts = [open_shard(file) for file in self.files]
        self._check_shards()
        self.tied = self._is_tied()
        self.specs = {spec.name: spec for spec in self._specs()}

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's rows, joined over the files, query and key rows in Hugging Face's order."""
        parts = [part[self._meta_name[name]] for part in self.parts]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            head = self.params.head_dim
            for block in join_parts(parts, self._split_dim(name), multiple=head):
                yield interleaved_to_halves(block, head)
        else:
            yield from join_parts(parts, self._split_dim(name))

    def config(self, max_position_embeddings: int, special_ids: dict[str, Any]) -> dict[str, Any]:
        """The model's `config.json`."""
        params = self.params
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.rope_theta}
        if params.use_scaled_rope:
            rope |= {
                "rope_type": "llama3",
                # params.json leaves the factor out: 8 in Llama 3.1, 32 in the tied models of Llama 3.2.
                "factor": float(params.rope_scaling_factor or (32.0 if self.tied else 8.0)),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        embedding = self.specs[INPUT]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[embedding.dtype],
            "vocab_size": embedding.shape[0],
            "hidden_size": params.dim,
            "intermediate_size": self.specs["model.layers.0.mlp.gate_proj.weight"].shape[0],
            "num_hidden_layers": params.n_layers,
            "num_attention_heads": params.n_heads,
            "num_key_value_heads": params.n_kv_heads,
            "head_dim": params.head_dim,
            "max_position_embeddings": max_position_embeddings,
            "rms_norm_eps": params.norm_eps,
            "rope_parameters": rope,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": self.tied,
            "use_cache": True,
        } | special_ids

    @property
    def parameters(self) -> int:
        """Numbers in all the tensors."""
        return sum(math.prod(spec.shape) for spec in self.specs.values())

    @property
    def _meta_name(self) -> dict[str, str]:
        names = {INPUT: "tok_embeddings.weight"}
        for layer in range(self.params.n_layers):
            for meta, name in _LAYER_NAMES.items():
                names[f"model.layers.{layer}.{name}.weight"] = f"layers.{layer}.{meta}.weight"
        names["model.norm.weight"] = "norm.weight"
        if not self.tied:
            names[OUTPUT] = "output.weight"
        return names

    def _split_dim(self, name: str) -> int | None:
        """The dimension that the files cut a tensor along; None where each holds it whole."""
        if len(self.parts) == 1 or name.endswith("norm.weight"):
            return None
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return 1
        if name == INPUT:
            return 0 if self.parts[0]["tok_embeddings.weight"].shape[1] == self.params.dim else 1
        return 0

    def _specs(self) -> Iterator[TensorSpec]:
        for name, meta in self._meta_name.items():
            first, cut = self.parts[0][meta], self._split_dim(name)
            shape = list(first.shape)
            if cut is not None:
                shape[cut] = sum(part[meta].shape[cut] for part in self.parts)
            yield TensorSpec(name, dtype_name(first.dtype), tuple(shape))

    def _is_tied(self) -> bool:
        """Whether the checkpoint has one matrix for input and output, stored once or twice."""
        if "output.weight" not in self.parts[0]:
            return True
        for part in self.parts:
            one, other = part["tok_embeddings.weight"], part["output.weight"]
            if one.shape != other.shape or not torch.equal(one[:64], other[:64]) or not torch.equal(one, other):
                return False
        return True

    def _check_shards(self) -> None:
        params = self.params
        query = self.parts[0].get("layers.0.attention.wq.weight")
        if query is None or query.dim() != 2 or not 0 < query.shape[0] <= params.dim:
            raise ModelError(f"{self.files[0]} holds no LLaMA (no layers.0.attention.wq.weight); check input_dir.")
        expected = max(1, params.dim // query.shape[0])
        if len(self.files) < expected:
            missing = f"consolidated.{len(self.files):02}.pth"
            raise ModelError(f"{self.folder / missing} is missing: these files are cut in {expected}; fetch it.")
        if len(self.files) > expected:
            surplus = self.files[expected].name
            raise ModelError(f"{self.folder / surplus} is surplus: these files are cut in {expected}; remove it.")
        wanted = {"tok_embeddings.weight", "norm.weight"} | {
            f"layers.{layer}.{meta}.weight" for layer in range(params.n_layers) for meta in _LAYER_NAMES
        }
        for file, part in zip(self.files, self.parts, strict=True):
            self._check_names(file, part, wanted)
            self._check_shapes(file, part, expected)

    def _check_names(self, file: Path, part: dict[str, torch.Tensor], wanted: set[str]) -> None:
        present = {name for name in part if not _ROPE_TABLE.fullmatch(name)} - {"output.weight"}
        if present != wanted:
            lacking, unknown = sorted(wanted - present), sorted(present - wanted)
            what = f"lacks {lacking[0]}" if lacking else f"holds {unknown[0]}, which a LLaMA does not have"
            raise ModelError(f"{file} {what} (params.json: {self.params.n_layers} layers); fetch both again.")

    def _check_shapes(self, file: Path, part: dict[str, torch.Tensor], cut: int) -> None:
        params, shape = self.params, {name: tuple(tensor.shape) for name, tensor in part.items()}
        tokens = shape.get("output.weight", shape["tok_embeddings.weight"])[0]
        hidden = shape["layers.0.feed_forward.w1.weight"][0]
        if not tokens or not hidden:
            raise ModelError(f"{file} has a matrix without rows; it is damaged, fetch it again.")
        kv_rows = params.n_kv_heads * params.head_dim // cut
        per_layer = {
            "attention_norm": (params.dim,),
            "ffn_norm": (params.dim,),
            "attention.wq": (params.dim // cut, params.dim),
            "attention.wk": (kv_rows, params.dim),
            "attention.wv": (kv_rows, params.dim),
            "attention.wo": (params.dim, params.dim // cut),
            "feed_forward.w1": (hidden, params.dim),
            "feed_forward.w3": (hidden, params.dim),
            "feed_forward.w2": (params.dim, hidden),
        }
        expected = {"norm.weight": (params.dim,), "output.weight": (tokens, params.dim)}
        for layer in range(params.n_layers):
            expected |= {f"layers.{layer}.{meta}.weight": sizes for meta, sizes in per_layer.items()}
        if shape["tok_embeddings.weight"] != (tokens, params.dim):
            expected["tok_embeddings.weight"] = (tokens * cut, params.dim // cut)
        for name, sizes in expected.items():
            if shape.get(name, sizes) != sizes:
                raise ModelError(
                    f"{file}: {name} is {shape[name]} where params.json asks for {sizes}; fetch both again."
                )


def list_shards(folder: Path) -> list[Path]:
    """The `consolidated.NN.pth` of a folder, from 00 on.

    Raises:
        ModelError: there is none, or a number between the first and the last is missing.
    """
    numbers = sorted(int(match[1]) for file in folder.iterdir() if (match := _SHARD.fullmatch(file.name)))
    if not numbers:
        raise ModelError(f"{folder} has no consolidated.00.pth; give input_dir=FOLDER of Meta's files.")
    for number in range(numbers[-1]):
        if number not in numbers:
            raise ModelError(f"{folder}/consolidated.{number:02}.pth is missing; fetch it.")
    return [folder / f"consolidated.{number:02}.pth" for number in numbers]


def open_shard(file: Path) -> dict[str, torch.Tensor]:
    """A file's tensors, mapped and not read.

    Raises:
        ModelError: the file is truncated, damaged or holds something else than tensors.
    """
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # unpickling damaged bytes ends in any of them
        reason = " ".join(str(error).partition("\n")[0].split())[:120]
        raise ModelError(f"{file} cannot be read ({reason}); it is truncated or damaged, fetch it again.") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ModelError(f"{file} holds something else than named tensors; fetch it again.")
    for name, value in tensors.items():
        usable = value.dtype in _DTYPES and value.dim() > 0 and value.layout is torch.strided
        if not isinstance(name, str) or not (usable or _ROPE_TABLE.fullmatch(name)):
            raise ModelError(f"{file} has {shorten(name)} of a type or shape that no LLaMA's has; fetch it again.")
    return tensors


def join_parts(parts: list[torch.Tensor], cut: int | None, multiple: int = 1) -> Iterator[torch.Tensor]:
    """Rows of a tensor that is cut along `cut` into parts, about 64 MiB at a time."""
    if cut is None:
        yield from split_rows(parts[0], multiple=multiple)
    elif cut == 0:
        for part in parts:
            yield from split_rows(part, multiple=multiple)
    else:
        row_bytes = sum(part[0].nbytes for part in parts)
        rows = max(1, BLOCK_BYTES // row_bytes)
        for blocks in zip(*(torch.split(part, rows) for part in parts), strict=True):
            yield torch.cat(blocks, dim=1)
