"""Which kinds of model each part of cqlora knows, in one table that is checked before anything is loaded.

A kind has a part where tests have it equal to stock transformers, and try it on a small model (docs/models.md).
Any other kind would often run and be wrong without a word: a factor left out, a sliding window ignored.
"""

from enum import Enum
from pathlib import Path
from typing import Any

from cqlora.errors import ModelError


class Part(Enum):
    """What is to be done with a model; the value is how the error that refuses a model names it."""

    train = "cqlora trains"
    plan = "cqlora plans runs of"
    fused = "fused layers compute"
    rows = "rows that an extension added train on"
    merge = "cqlora merges into"
    nf4 = "format=nf4 writes"
    gguf = "format=gguf writes"
    engine = "the engine runs"


MODEL_TYPES: dict[str, frozenset[Part]] = {
    "llama": frozenset(Part),
    "mistral": frozenset(Part),
    "qwen2": frozenset(Part),
    "qwen3": frozenset(Part),
    "smollm3": frozenset(Part),
}
"""config.json's `model_type`, and the parts that know it."""

ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")

_INSTEAD = {Part.engine: "run this one with transformers or vLLM", Part.gguf: "use format=safetensors"}
"""What to do with a model that a part of ours does not compute. The other parts build on transformers' own layers, and
so take their options as they are."""


def require_known(part: Part, config: dict[str, Any], folder: Path, longest: int | None = None) -> None:
    """Refuse a model that a part does not know, in one sentence.

    Args:
        part: what is to be done with it.
        config: its config.json.
        folder: where it lies.
        longest: tokens of the longest document it will read, where that is bounded.

    Raises:
        ModelError: another kind of model, an option that the part lacks, or a window that is in use.
    """
    kind = config.get("model_type")
    if part not in MODEL_TYPES.get(str(kind), ()):
        known = [name for name, parts in MODEL_TYPES.items() if part in parts]
        raise ModelError(
            f"{folder} holds {_describe_kind(config)}; {part.value} {_join(known)} only, so {_ways_out(part, known)}."
        )
    if part in _INSTEAD:
        _require_plain(part, config, folder)
    window = find_window(config)
    if window is not None and (longest is None or longest > window):
        read = "" if longest is None else f" and documents of up to {longest} are read"
        within = f"use stage.sequence_length={window}, within which the window changes nothing, or another model"
        raise ModelError(
            f"{folder} attends within a sliding window of {window} tokens{read}, which cqlora does not; "
            f"{_INSTEAD.get(part, within)}."
        )


def find_window(config: dict[str, Any]) -> int | None:
    """Tokens of the sliding window that a model's layers use; None where every token is attended to.

    transformers' defaults stand for what config.json leaves out.
    """
    kind = config.get("model_type")
    # In Mistral the window is on unless it is null; the others have a switch, which is off unless it is set.
    if kind == "mistral" or (kind in ("qwen2", "qwen3", "smollm3") and config.get("use_sliding_window", False)):
        window = config.get("sliding_window", None if kind == "smollm3" else 4096)
        return None if window is None else int(window)
    return None


def find_head_dim(config: dict[str, Any]) -> int:
    """Width of one attention head."""
    default = 128 if config.get("model_type") == "qwen3" else config["hidden_size"] // config["num_attention_heads"]
    return int(config.get("head_dim") or default)


def find_biases(config: dict[str, Any]) -> list[str]:
    """Linear layers of a block that have a bias, in their order."""
    kind = config["model_type"]
    if kind == "qwen2":
        return ["q_proj", "k_proj", "v_proj"]
    attention = kind != "mistral" and config.get("attention_bias")
    mlp = kind in ("llama", "smollm3") and config.get("mlp_bias")
    return [*(ATTENTION_LAYERS if attention else ()), *(MLP_LAYERS if mlp else ())]


def has_head_norms(config: dict[str, Any]) -> bool:
    """Whether each head's queries and keys are normalised before they are rotated."""
    return bool(config["model_type"] == "qwen3")


def ties_embeddings(config: dict[str, Any]) -> bool:
    """Whether input and output share one embedding matrix."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") == "smollm3"))


def find_unrotated_layers(config: dict[str, Any]) -> list[int]:
    """Numbers of the layers without rotary embedding, from 0."""
    if config["model_type"] != "smollm3":
        return []
    layers, step = range(config["num_hidden_layers"]), config.get("no_rope_layer_interval") or 4
    # 1 stands for a layer with rotary embedding, whatever the key is called.
    stated = config.get("no_rope_layers") or [(layer + 1) % step for layer in layers]
    return [layer for layer, rotary in enumerate(stated) if not rotary]


def _require_plain(part: Part, config: dict[str, Any], folder: Path) -> None:
    """Raise ModelError for options of a kind's layers that only transformers' own have."""
    if part is Part.gguf and config["model_type"] != "qwen2" and (biased := find_biases(config)):
        raise ModelError(
            f"{folder} has a bias in {_join(biased)}, and {part.value} layers without bias only; {_INSTEAD[part]}."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(
            f"{folder} has hidden_act={config['hidden_act']}, and {part.value} silu only; {_INSTEAD[part]}."
        )


def _ways_out(part: Part, known: list[str]) -> str:
    """What to do with a model of a kind that a part does not know."""
    give = f"give a model of {'that kind' if len(known) == 1 else 'one of these kinds'}"
    return f"{give}, or {_INSTEAD[part]}" if part in _INSTEAD else give


def _describe_kind(config: dict[str, Any]) -> str:
    kind = config.get("model_type")
    if not kind:
        return "a config.json without model_type"
    if "text_config" in config or "vision_config" in config:
        return f"a {kind} model, which is multi-modal"
    if config.get("num_local_experts") or config.get("num_experts"):
        return f"a {kind} model, which is a mixture of experts"
    return f"a {kind} model"


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
