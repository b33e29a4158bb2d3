"""The form that a model's matrices take on this machine: the one that computes fastest in the memory there is."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil
import torch

from cqlora.errors import ConfigError, ModelError
from cqlora.inference.architecture import Architecture
from cqlora.inference.kernel import ROWS_TOGETHER, has_fused_nf4
from cqlora.system.machine import BFLOAT16_CAPABILITY, FLOAT16_CAPABILITY
from cqlora.system.processor import suits_bfloat16_matrices
from cqlora.weights.nf4 import GROUP

_GIB = 1 << 30
_NF4_BYTES = 0.53
"""Per number: half a byte, and a scale of two bytes for 64."""


class Layout(Enum):
    """How the blocks' matrices are held."""

    dense = "dense"
    fused_nf4 = "fused_nf4"


@dataclass(frozen=True, slots=True)
class Form:
    """How a model is held and computed."""

    layout: Layout
    dtype: torch.dtype
    device: torch.device
    unpacked: bool = False
    """Dense matrices hold the numbers that NF4 makes of a model's."""

    @property
    def activations(self) -> torch.dtype:
        """The type of everything between two matrices; see decoder.py."""
        return torch.float32 if self.device.type == "cpu" else self.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        held = {
            Layout.dense: f"NF4 numbers unpacked to {dtype}" if self.unpacked else f"matrices in {dtype}",
            Layout.fused_nf4: f"matrices in NF4, multiplied by a fused kernel in {dtype}",
        }
        return f"{held[self.layout]} on {self.device}"


def choose_form(architecture: Architecture, quantised: bool, dtype: str, device: torch.device, folder: Path) -> Form:
    """The form for a model; `quantised` says whether its matrices are to be those that NF4 makes of them.

    On a processor NF4 numbers are multiplied by the fused kernel where it is to be had, and else as 16- or
    32-bit numbers that are unpacked once: unpacking them for every token takes most of its time. float32 gives
    a training run's own numbers to the last digits; bfloat16 takes half its time and more.

    Raises:
        ConfigError: an unknown dtype.
        ModelError: the model does not fit in memory in any form.
    """
    if device.type == "cuda":
        return Form(Layout.dense, _named(dtype) or choose_gpu_dtype(device), device, unpacked=quantised)
    free = psutil.virtual_memory().available
    forms = _candidates(architecture, quantised, dtype, device)
    fitting = [form for form in forms if needed_bytes(architecture, form) < free]
    if not fitting:
        needed = min(needed_bytes(architecture, form) for form in forms) / _GIB
        raise ModelError(
            f"{folder} takes {needed:.1f} GiB and {free / _GIB:.1f} GiB of memory are free; close other programs, or "
            "use a machine with more memory."
        )
    return fitting[0]


def choose_gpu_dtype(device: torch.device) -> torch.dtype:
    """What a GPU multiplies fastest: bfloat16 from Ampere on, float16 on older ones with matrix units, else float32."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= BFLOAT16_CAPABILITY:
        return torch.bfloat16
    return torch.float16 if capability >= FLOAT16_CAPABILITY else torch.float32


def needed_bytes(architecture: Architecture, form: Form) -> float:
    """Memory of the weights in a form."""
    per_number = form.dtype.itemsize if form.layout is Layout.dense else _NF4_BYTES
    # oneDNN multiplies by a copy in its own order, from which no embedding can be read.
    twice = not architecture.tied or (form.dtype is torch.bfloat16 and form.device.type == "cpu")
    rows = architecture.vocab_size * architecture.hidden * (2 if twice else 1)
    return architecture.block_numbers * per_number + rows * form.dtype.itemsize


def _candidates(architecture: Architecture, quantised: bool, dtype: str, device: torch.device) -> list[Form]:
    """Forms that would do, the fastest first."""
    asked = _named(dtype)
    order = [torch.bfloat16, torch.float32] if suits_bfloat16_matrices() else [torch.float32, torch.bfloat16]
    forms = [Form(Layout.dense, kind, device, unpacked=quantised) for kind in ([asked] if asked else order)]
    if quantised and asked is not torch.float32 and fits_kernel(architecture) and has_fused_nf4():
        forms.insert(0, Form(Layout.fused_nf4, torch.bfloat16, device))
    return forms


def fits_kernel(architecture: Architecture) -> bool:
    """Whether every matrix of the blocks has a shape that the fused kernel takes."""
    heads, shared = architecture.heads * architecture.head_dim, architecture.key_value_heads * architecture.head_dim
    rows = (heads, shared, architecture.hidden, architecture.intermediate)
    columns = (architecture.hidden, heads, architecture.intermediate)
    return all(n % ROWS_TOGETHER == 0 for n in rows) and all(n % GROUP == 0 for n in columns)


def _named(dtype: str) -> torch.dtype | None:
    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ConfigError(f"dtype={dtype} is not a type that the engine computes in; use {', '.join(known)}.")
    return known[dtype]
