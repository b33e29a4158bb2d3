"""config.json of a base: the types and bounds of what is read of it, and the tensors that it asks for."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cqlora.errors import ModelError
from cqlora.system.documents import shorten, take, take_number

INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
"""The two embedding matrices in a LLaMA's files; a tied model has the first alone."""
DERIVED = "rotary_emb.inv_freq"
"""End of the names of frequencies that old LLaMA folders store though the configuration gives them."""
_SIZES = {
    "vocab_size": 1 << 31, "hidden_size": 1 << 20, "intermediate_size": 1 << 24, "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
}  # fmt: skip
_OPTIONAL_SIZES = {
    "num_key_value_heads": 1 << 16, "head_dim": 1 << 16, "max_position_embeddings": 1 << 31,
    "no_rope_layer_interval": 10_000, "sliding_window": 1 << 31,
}  # fmt: skip
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_ROPE_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast",
    "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
)  # fmt: skip
_ROPE_NEEDS = {
    "linear": ("factor",), "yarn": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")
}  # fmt: skip
_ROPE_KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
_LARGEST = 1e12


def check_config(config: dict[str, Any], file: Path) -> None:
    """Refuse a config.json whose sizes, numbers or switches are missing, of another type or impossible.

    Raises:
        ModelError: see above.
    """
    kind = take(config, "model_type", file, str)
    if "text_config" in config or "vision_config" in config:
        raise ModelError(f"{file} is of a {shorten(kind)} model, which is multi-modal; give a model of text alone.")
    for key, high in _SIZES.items():
        take_number(config, key, file, 1, high)
    for key, high in _OPTIONAL_SIZES.items():
        take_number(config, key, file, 1, high, default=None)
    if config.get("max_position_embeddings", 0) is None:
        raise ModelError(f"{file} has max_position_embeddings=null where transformers needs a number; correct it.")
    take_number(config, "rms_norm_eps", file, 1e-12, 1.0, float, default=None)
    take(config, "hidden_act", file, str, default=None)
    take(config, "quantization_config", file, dict, default=None)
    take(config, "no_rope_layers", file, list, default=None)
    for key in _SWITCHES:
        take(config, key, file, bool, default=None)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        _check_ids(config, key, file)
    _check_rope(config, file)
    _check_heads(config, file)


def check_tensors(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Compare the tensors of a folder with what its config.json asks for.

    Of a LLaMA every tensor is known; of other models, and of weights that are quantised, the embedding alone.

    Raises:
        ModelError: a tensor is missing, of another shape, or of a layer that the model does not have.
    """
    wanted: dict[str, tuple[int, ...]] = {INPUT: (config["vocab_size"], config["hidden_size"])}
    if config["model_type"] == "llama":
        # First, so that a huge count of layers in a damaged file costs nothing.
        _check_count(config["num_hidden_layers"], shapes, folder)
        wanted |= dict(_llama_shapes(config))
        if not config.get("tie_word_embeddings"):
            wanted[OUTPUT] = wanted[INPUT]
    packed = "quantization_config" in config
    for name, shape in wanted.items():
        if name not in shapes:
            raise ModelError(f"{folder} has no {name} though its config.json asks for it; fetch the model again.")
        if shapes[name] != shape and not (packed and name not in (INPUT, OUTPUT)):
            raise ModelError(
                f"{folder} has {name} of shape {list(shapes[name])} and its config.json asks for {list(shape)}; they "
                "are not of one model, fetch both again."
            )


def layers_of(names: Iterable[str]) -> set[str]:
    """The numbers of the layers that tensors belong to, as text."""
    return {name.split(".")[2] for name in names if name.startswith("model.layers.")}


def _check_count(layers: int, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    held = len(layers_of(shapes))
    if held != layers:
        raise ModelError(
            f"{folder} holds {held} layers and its config.json says num_hidden_layers={layers}; the two are not of one "
            "model, fetch both again."
        )


def _llama_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    keys = head_dim * (config.get("num_key_value_heads") or heads)
    of_layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        for module, shape in of_layer.items():
            yield f"model.layers.{layer}.{module}.weight", shape
    yield "model.norm.weight", (hidden,)


def _check_ids(config: dict[str, Any], key: str, file: Path) -> None:
    ids = take(config, key, file, (int, list), default=[])
    for value in ids if isinstance(ids, list) else [ids]:
        # LLaMA's first configurations say -1 where there is no padding token.
        take_number({key: value}, key, file, -1, 1 << 31)


def _check_rope(config: dict[str, Any], file: Path) -> None:
    scalings = [take(config, key, file, dict, default={}) for key in ("rope_scaling", "rope_parameters")]
    for values in (config, *scalings):
        for key in _ROPE_NUMBERS:
            take_number(values, key, file, 1e-6, _LARGEST, float, default=None)
        for key in ("type", "rope_type"):
            take(values, key, file, str, default=None)
        take(values, "truncate", file, bool, default=None)
    if all(scalings) and scalings[0] != scalings[1]:
        raise ModelError(
            f"{file} scales positions by rope_scaling and by rope_parameters, of which programs take one or the other; "
            "leave one of them out."
        )
    for values in scalings:
        kind = values.get("rope_type", values.get("type", "default"))
        by_layer = any(isinstance(value, dict) for value in values.values())
        if kind not in _ROPE_KINDS or values.get("type", kind) != kind or by_layer:
            raise ModelError(
                f"{file} scales positions by {shorten(values)}, which is none of {', '.join(_ROPE_KINDS)} for the "
                "whole model; correct it, or give a model of another kind."
            )
        needed = _ROPE_NEEDS.get(kind, ())
        for key in needed:
            take_number(values, key, file, 1e-6, _LARGEST, float)
        if kind == "llama3" and values["low_freq_factor"] == values["high_freq_factor"]:
            raise ModelError(f"{file} has low_freq_factor equal to high_freq_factor; correct it or fetch it again.")


def _check_heads(config: dict[str, Any], file: Path) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    keys = config.get("num_key_value_heads") or heads
    if heads % keys:
        raise ModelError(
            f"{file} has num_attention_heads={heads}, which is no multiple of num_key_value_heads={keys}; correct it."
        )
    if config["model_type"] != "llama":
        return
    if not config.get("head_dim") and hidden % heads:
        raise ModelError(
            f"{file} has hidden_size={hidden}, which is no multiple of num_attention_heads={heads}; fetch it again."
        )
    if (config.get("head_dim") or hidden // heads) % 2:
        raise ModelError(f"{file} makes heads of an odd number of dimensions; correct it or fetch it again.")
