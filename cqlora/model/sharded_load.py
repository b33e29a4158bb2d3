"""A base whose blocks are read one at a time, so that a worker never holds more than its shards and one block.

The model is laid out with stand-ins that have a weight's shape, type and device and no memory. What is outside
the blocks is read at once, for adapters start from it; a block is read, from mapped safetensors, and quantised
when it is about to be sharded.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Params4bit
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from cqlora.base import Base
from cqlora.errors import ModelError
from cqlora.system.model_config import OUTPUT
from cqlora.system.shards import ShardReader

Fill = Callable[[nn.Module], None]
"""Reads the weights of one block into it."""

_Place = tuple[str, nn.Module, str]
"""A tensor's name in the base's files, the module that it belongs to and its name there."""


def lay_out_base(
    base: Base,
    config: PreTrainedConfig,
    quantization: BitsAndBytesConfig | None,
    attention: str,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[PreTrainedModel, Fill]:
    """The causal language model of a base folder with empty blocks on `device`, and what fills a block.

    Raises:
        ModelError: the weights cannot be read, or lack a tensor that the model has.
    """
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if quantization is not None:
        replace_with_bnb_linear(model, ["lm_head"], quantization)
        # As the stock loader leaves them: PEFT looks here for the kind of its adapters, an adapter's card for how
        # its base was held.
        model.is_loaded_in_4bit = True
        model.config.quantization_config = quantization
    blocks = {id(module): block for block in model.model.layers for module in block.modules()}
    places: dict[int, list[_Place]] = {id(block): [] for block in model.model.layers}
    outside: list[_Place] = []
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            block = blocks.get(id(module))
            place = (f"{prefix}.{name}", module, name)
            (outside if block is None else places[id(block)]).append(place)
            setattr(module, name, _stand_in(parameter, device))
    if base.tied:
        outside = [place for place in outside if place[0] != OUTPUT]
    check_names(ShardReader(base.path), [*outside, *(place for block in places.values() for place in block)])
    _read(base, outside, device, dtype)
    model.tie_weights()
    # Not model.to, which quantises every stand-in.
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))

    def fill(block: nn.Module) -> None:
        _read(base, places.pop(id(block)), device, dtype)

    return model, fill


def check_names(reader: ShardReader, places: list[_Place]) -> None:
    """Raise ModelError for a tensor of the model that the files lack."""
    for name, _, _ in places:
        if name not in reader.specs:
            raise ModelError(f"{reader.folder} has no tensor {name}; convert the base again.")


def _stand_in(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """A parameter that looks like `parameter` on `device` and repeats a single number."""
    packed = isinstance(parameter, Params4bit)
    # Bytes, as a quantised weight has elsewhere: PEFT gives an adapter the type of a base in floating point.
    data = torch.zeros((), dtype=torch.uint8 if packed else parameter.dtype, device=device).expand(parameter.shape)
    return _like(parameter, data) if packed else nn.Parameter(data, requires_grad=False)


def _like(weight: Params4bit, data: torch.Tensor, **options: Any) -> Params4bit:
    """`data`, to be quantised as `weight` is."""
    return Params4bit(
        data,
        requires_grad=False,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        module=weight.module,
        **options,
    )


def _read(base: Base, places: list[_Place], device: torch.device, dtype: torch.dtype) -> None:
    """Put real weights in the places of stand-ins.

    The files are mapped anew for each block, so that what was read of them before is let go.
    """
    reader = ShardReader(base.path)
    for name, module, attribute in places:
        stand_in = getattr(module, attribute)
        weight = reader.read(name)
        if isinstance(stand_in, Params4bit):
            setattr(module, attribute, _like(stand_in, weight.to(dtype)).to(device))
        else:
            # A copy, since the mapped tensor is the file.
            setattr(module, attribute, nn.Parameter(weight.to(device, dtype, copy=True), requires_grad=False))
    _give_heap_back()


def _give_heap_back() -> None:
    """Return freed memory to the system: quantising on a host leaves holes of some matrices' size in glibc's heap."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
