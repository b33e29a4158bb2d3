"""bitsandbytes' fused NF4 product for processors with AVX512-BF16, called without importing bitsandbytes.

The import takes longer than a small model's first reply; the product is one function of its library
(bitsandbytes, backends/cpu/ops.py, gemv_4bit), which takes any number of rows in spite of its name.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cqlora.inference.proof import NativeCall, is_proven
from cqlora.system.processor import may_fuse_nf4
from cqlora.weights.nf4 import GROUP

ROWS_TOGETHER = 32
"""The kernel takes matrices whose rows are a multiple of this and whose columns are one of GROUP."""


FUSED_NF4 = NativeCall("bitsandbytes' fused NF4 product", "bitsandbytes", "cqlora.inference.checks:check_fused_nf4")


def has_fused_nf4() -> bool:
    """Whether the processor and the installed bitsandbytes have the product, it is not hidden, and it is right."""
    return may_fuse_nf4() and _load_product() is not None and is_proven(FUSED_NF4)


@cache
def _load_product() -> Any:
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("libbitsandbytes_cpu.so")
    if not file.is_file():
        return None
    library = ctypes.CDLL(str(file))
    if not hasattr(library, "has_avx512bf16_cpu") or not hasattr(library, "gemv_4bit_inference_cpu_nf4_bf16"):
        return None
    if not library.has_avx512bf16_cpu():
        return None
    function = library.gemv_4bit_inference_cpu_nf4_bf16
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [number, number, number, pointer, pointer, pointer, pointer, number, number, number]
    function.restype = None
    return function


def fused_nf4_product(inputs: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 (tokens, out) of bfloat16 (tokens, in) and a matrix packed by pack_for_kernel."""
    inputs = inputs.contiguous()
    tokens, columns = inputs.shape
    rows = packed.shape[0]
    outputs = inputs.new_empty(tokens, rows)
    _load_product()(
        tokens, rows, columns, inputs.data_ptr(), packed.data_ptr(), scales.data_ptr(), outputs.data_ptr(),
        GROUP, columns, rows,
    )  # fmt: skip
    return outputs
