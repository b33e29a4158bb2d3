"""Load a base with its matrices quantised and frozen, computing in the type that suits the device."""

import logging
from typing import Any, cast

import torch
from accelerate.hooks import remove_hook_from_module
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cqlora.architectures import find_head_dim
from cqlora.base import Base
from cqlora.config.choices import Checkpointing, Precision, Quantization, Strategy
from cqlora.config.schema import HardwareConfig, ModelConfig
from cqlora.errors import ModelError
from cqlora.model.attention import name_attention
from cqlora.model.fused.linear import keep_trainable_layout
from cqlora.model.sharded_load import Fill, lay_out_base
from cqlora.positions import read_rope, scale_positions

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = {
    Precision.float32: torch.float32,
    Precision.bfloat16: torch.bfloat16,
    Precision.float16: torch.float16,
}
"""The type of matrix products by the settled precision."""


def load_base(
    base: Base, model: ModelConfig, hardware: HardwareConfig, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """The frozen causal language model of a base folder, whole, checked against the configured shape.

    It is on `device`, or under `layers` spread over the GPUs.

    Raises:
        ModelError: the folder's shape is not the configured one, or its weights cannot be read.
    """
    check_shape(base, model)
    transformers_logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    loaded: PreTrainedModel
    try:
        loaded, report = loader.from_pretrained(
            base.path,
            config=open_config(base, model),
            dtype=dtype,
            quantization_config=quantization_config(model, hardware, dtype),
            attn_implementation=name_attention(model.attention, device.type),
            device_map=device_map(model, hardware, device),
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # a damaged folder ends in errors of many kinds within transformers
        raise ModelError(f"the weights of {base.path} cannot be loaded: {_first_line(error)}") from error
    if report["missing_keys"]:
        # transformers fills them with random numbers.
        lacking = min(report["missing_keys"])
        raise ModelError(f"{base.path} has no {lacking}, so its weights are not whole; fetch it again.")
    if hardware.strategy is Strategy.layers:
        keep_hooks_of_blocks(loaded)
    logger.info("base %s: %s, computing in %s on %s", base.path, model.quantization.name, dtype, device)
    return freeze(loaded)


def keep_hooks_of_blocks(model: PreTrainedModel) -> None:
    """Leave of accelerate's hooks within blocks those around whole ones, which bring everything to their GPU.

    A hook is a `forward` of the instance's own: beneath one, a class that is put in another's place would never run.
    """
    for block in cast(torch.nn.ModuleList, find_decoder(model).layers):
        for module in block.modules():
            if module is not block:
                remove_hook_from_module(module)
                vars(module).pop("forward", None)


def open_model(
    base: Base, model: ModelConfig, hardware: HardwareConfig, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, Fill]:
    """A base to train on, and what fills its blocks when `place` comes to them.

    Under `fsdp` they are empty until then, elsewhere they are loaded at once.

    Raises:
        ModelError: as `load_base`.
    """
    if hardware.strategy is not Strategy.fsdp:
        return load_base(base, model, hardware, device, dtype), fill_nothing
    check_shape(base, model)
    attention = name_attention(model.attention, device.type)
    config = open_config(base, model)
    laid_out, fill = lay_out_base(base, config, quantization_config(model, hardware, dtype), attention, device, dtype)
    logger.info("base %s: %s, block by block, in %s on %s", base.path, model.quantization.name, dtype, device)
    return freeze(laid_out), fill


def open_config(base: Base, model: ModelConfig) -> PreTrainedConfig:
    """transformers' configuration of a base, its positions scaled as the run says."""
    scaled = scale_positions(base.config, model.rope_scaling, model.rope_factor, base.path)
    own: PreTrainedConfig = AutoConfig.from_pretrained(base.path, local_files_only=True)
    if scaled is not base.config:
        own.rope_parameters, own.max_position_embeddings = read_rope(scaled), scaled["max_position_embeddings"]
    return own


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """The model with nothing to train and no cache."""
    keep_trainable_layout(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def fill_nothing(block: torch.nn.Module) -> None:
    """Blocks that were loaded whole need no filling."""


def device_map(model: ModelConfig, hardware: HardwareConfig, device: torch.device) -> dict[str, torch.device]:
    """Which device each module is loaded to: `device`, or under `layers` an even share of the blocks a GPU.

    The embedding is on the first GPU, the final norm on the last and the output projection beside the last
    block, unless it is the embedding itself.
    """
    if hardware.strategy is not Strategy.layers:
        return {"": device}
    gpus = [torch.device("cuda", gpu) for gpu in range(max(1, hardware.gpus_per_node))]
    blocks = model.num_hidden_layers
    devices = {f"model.layers.{block}": gpus[block * len(gpus) // blocks] for block in range(blocks)}
    last = devices[f"model.layers.{blocks - 1}"]
    head = gpus[0] if model.tie_word_embeddings else last
    return {"model.embed_tokens": gpus[0], **devices, "model.norm": last, "model.rotary_emb": gpus[0], "lm_head": head}


def quantization_config(model: ModelConfig, hardware: HardwareConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What bitsandbytes is asked for; None keeps the matrices in the compute type."""
    if model.quantization is Quantization.none:
        return None
    if model.quantization is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    # fully_shard splits only parameters of the compute type: packed uint8 would stay whole on every rank.
    storage = dtype if hardware.strategy is Strategy.fsdp else torch.uint8
    return nf4_config(model.double_quantization, dtype, storage)


def nf4_config(double_quantization: bool, dtype: torch.dtype, storage: torch.dtype = torch.uint8) -> BitsAndBytesConfig:
    """NF4 with products in `dtype`, its packed numbers held in tensors of the type `storage`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def check_shape(base: Base, model: ModelConfig) -> None:
    """Raise ModelError when the folder's config.json is not the shape that was composed and planned for."""
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        actual, composed = base.config.get(key), getattr(model, key)
        if key == "num_key_value_heads" and actual is None:
            actual = base.config.get("num_attention_heads")
        if key == "head_dim":
            composed = model.head_size
            actual = find_head_dim(base.config)
        if actual != composed:
            raise ModelError(
                f"model={model.name} has {key}={composed} and {base.path} has {actual}; choose the "
                f"model group of that folder, or set model.{key}={actual}."
            )


def checkpoint_activations(model: PreTrainedModel | PeftModel, choice: Checkpointing) -> None:
    """Let each block keep only its input and compute the rest again in the backward pass, if so chosen."""
    if choice is Checkpointing.full:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def find_head(model: torch.nn.Module) -> torch.nn.Module:
    """The output projection, wrapped by PEFT or not."""
    return cast(torch.nn.Module, _core(model).lm_head)


def find_decoder(model: torch.nn.Module) -> torch.nn.Module:
    """The stack of blocks with its input embedding and final norm, below the output projection."""
    return cast(torch.nn.Module, _core(model).model)


def find_embedding(model: torch.nn.Module) -> torch.nn.Module:
    """The input embedding, wrapped by PEFT or not."""
    return cast(torch.nn.Module, find_decoder(model).embed_tokens)


def _core(model: Any) -> torch.nn.Module:
    core: torch.nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return core


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
