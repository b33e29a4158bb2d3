"""The NF4 codes and scales of a matrix, from a base that is quantised now or from a folder that is NF4 already."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from cqlora.errors import ModelError
from cqlora.system.shards import ShardReader
from cqlora.weights.merge_changes import RowStream
from cqlora.weights.nf4 import GROUP, Nf4Format, quantise

STATE = "quant_state.bitsandbytes__nf4"


@dataclass(frozen=True, slots=True)
class Nf4Parts:
    """A quantised matrix."""

    packed: torch.Tensor
    """uint8 (out, in / 2): two neighbours of a row in a byte, the first in the high half."""
    scales: torch.Tensor
    """float32 (out · in / 64,)."""
    dtype: torch.dtype
    """The type that a training run's forward pass sees its numbers in."""
    codes: torch.Tensor
    """float32 (16,): the numbers that the codes stand for."""

    def to(self, device: torch.device) -> "Nf4Parts":
        """The same on another device."""
        return Nf4Parts(self.packed.to(device), self.scales.to(device), self.dtype, self.codes.to(device))

    def dense(self) -> torch.Tensor:
        """float32 (out, in): what a forward pass of a training run multiplies by."""
        # A table of both numbers of a byte reads each byte once.
        pairs = torch.stack([self.codes.repeat_interleave(16), self.codes.repeat(16)], dim=1)
        numbers = pairs[self.packed.int()].view(len(self.scales), GROUP)
        return (numbers * self.scales[:, None]).view(len(self.packed), -1).to(self.dtype).float()


def quantise_rows(rows: RowStream, shape: tuple[int, ...], form: Nf4Format) -> Nf4Parts:
    """The parts of a matrix that bitsandbytes quantises now, exactly as in training."""
    matrix = quantise(rows, shape, form)
    out, columns = shape
    return Nf4Parts(matrix.packed.view(out, columns // 2), matrix.scales(), form.dtype, matrix.state.code)


def read_parts(reader: ShardReader, name: str) -> Nf4Parts:
    """The parts of a matrix from a folder that holds it in NF4, as transformers writes it.

    Raises:
        ModelError: another kind of quantisation, or another group size.
    """
    if f"{name}.{STATE}" not in reader.specs:
        raise ModelError(f"{reader.folder} has no NF4 state of {name}; give a folder that `cqlora merge` wrote.")
    try:
        state = json.loads(bytes(reader.read(f"{name}.{STATE}").tolist()))
        if state["quant_type"] != "nf4" or type(state["blocksize"]) is not int:
            raise ValueError("it is of another kind")
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{reader.folder} has a damaged NF4 state of {name} ({error}); merge it again.") from error
    if state["blocksize"] != GROUP:
        raise ModelError(f"{reader.folder} has NF4 groups of {state['blocksize']}; the engine reads {GROUP}.")
    scales = reader.read(f"{name}.absmax")
    if "nested_offset" in state:
        codes, scale_group = reader.read(f"{name}.nested_quant_map"), state["nested_blocksize"]
        of_scales = reader.read(f"{name}.nested_absmax").repeat_interleave(scale_group)[: len(scales)]
        scales = codes[scales.int()] * of_scales + state["nested_offset"]
    out, columns = state["shape"]
    return Nf4Parts(
        packed=reader.read(name).view(out, columns // 2),
        scales=scales.float(),
        dtype=getattr(torch, state["dtype"]),
        codes=reader.read(f"{name}.quant_map"),
    )


def holds_nf4(config: dict[str, object], folder: Path) -> bool:
    """Whether a model folder is NF4 already, by its config.json.

    Raises:
        ModelError: it is quantised in another way.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return False
    assert isinstance(quantization, dict), "quantization_config is an object"
    if quantization.get("load_in_4bit") and quantization.get("bnb_4bit_quant_type") == "nf4":
        return True
    raise ModelError(
        f"{folder} is quantised by {quantization.get('quant_method')} and not in bitsandbytes' NF4; give the 16-bit "
        "model, or one that `cqlora merge format=nf4` wrote."
    )
