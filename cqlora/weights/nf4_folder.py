"""A model folder whose blocks' matrices are NF4 already, so that loading it quantises nothing.

The files are those that transformers writes for a model in bitsandbytes' 4 bits, and reads by plain
`from_pretrained`: beside each `….weight` its scales and a `quant_state`, and in config.json how it was done.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cqlora.system.shards import TensorSource, TensorSpec, dtype_name, write_shards
from cqlora.weights.nf4 import GROUP, SCALE_GROUP, Nf4Format, is_block_matrix, quantise

STATE_BYTES = 256
"""Room for a matrix's quant_state, JSON whose length depends on a number in it: blanks fill it up."""


def write_nf4_folder(folder: Path, source: TensorSource, form: Nf4Format, max_shard_size: int) -> dict[str, str]:
    """Write `source` with its blocks' matrices in NF4, quantised from its own 16-bit numbers, one at a time.

    Returns:
        sha256 of each tensor's bytes by its name.
    """
    parts = {name: list(stored_specs(spec, form)) for name, spec in source.specs.items()}
    owners = {part.name: source.specs[name] for name, specs in parts.items() for part in specs}
    waiting: dict[str, torch.Tensor] = {}

    def produce(part: TensorSpec) -> Iterator[torch.Tensor]:
        owner = owners[part.name]
        if not is_block_matrix(owner):
            yield from (rows.to(form.dtype) for rows in source.blocks(owner.name))
            return
        if part.name == owner.name:
            waiting.update(quantised_tensors(source, owner, form))
        yield waiting.pop(part.name)

    return write_shards(folder, [part for specs in parts.values() for part in specs], produce, max_shard_size)


def quantised_tensors(source: TensorSource, spec: TensorSpec, form: Nf4Format) -> dict[str, torch.Tensor]:
    """What the folder holds of a matrix of the blocks, by name."""
    matrix = quantise(lambda: (rows.float() for rows in source.blocks(spec.name)), spec.shape, form)
    tensors = {spec.name: matrix.packed}
    for key, tensor in matrix.state.as_dict(packed=True).items():
        if key.startswith("quant_state"):
            tensor = torch.nn.functional.pad(tensor, (0, STATE_BYTES - len(tensor)), value=ord(" "))
        tensors[f"{spec.name}.{key}"] = tensor
    return tensors


def stored_specs(spec: TensorSpec, form: Nf4Format) -> Iterator[TensorSpec]:
    """What the folder holds of a tensor: itself in the compute type, or packed numbers with their scales.

    transformers gives what is not quantised the type that it is stored in, whatever config.json says.
    """
    if not is_block_matrix(spec):
        yield TensorSpec(spec.name, dtype_name(form.dtype), spec.shape)
        return
    numbers = spec.shape[0] * spec.shape[1]
    groups = -(-numbers // GROUP)
    yield TensorSpec(spec.name, "U8", (-(-numbers // 2), 1))
    yield TensorSpec(f"{spec.name}.absmax", "U8" if form.double_quantization else "F32", (groups,))
    yield TensorSpec(f"{spec.name}.quant_map", "F32", (16,))
    if form.double_quantization:
        yield TensorSpec(f"{spec.name}.nested_absmax", "F32", (-(-groups // SCALE_GROUP),))
        yield TensorSpec(f"{spec.name}.nested_quant_map", "F32", (256,))
    yield TensorSpec(f"{spec.name}.quant_state.bitsandbytes__nf4", "U8", (STATE_BYTES,))


def nf4_folder_config(config: dict[str, Any], form: Nf4Format) -> dict[str, Any]:
    """The model's config.json with what transformers needs to read the folder."""
    dtype = str(form.dtype).removeprefix("torch.")
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": form.double_quantization,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    }
    return config | {"dtype": dtype, "quantization_config": quantization}
