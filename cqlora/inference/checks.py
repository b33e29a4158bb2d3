"""What is_proven runs in a child process: native products of a small matrix beside the plain one."""

from collections.abc import Callable

import torch

from cqlora.errors import ModelError
from cqlora.inference.kernel import fused_nf4_product
from cqlora.inference.linear import Dense, Linear, pack_for_kernel, pack_matrix
from cqlora.weights.nf4 import GROUP

_ROWS, _COLUMNS = 96, 128
_TOKENS = (1, 4, 40)
"""Libraries go different ways for one row, a few and many."""
_MOST_ERROR = 0.02
"""Of the product's size: bfloat16 has eight bits."""
_CODES = [
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip
"""The sixteen numbers of NF4 (2305.14314, appendix E)."""


def check_fused_nf4() -> None:
    """bitsandbytes' fused product.

    Raises:
        ModelError: its numbers are others than those of the unpacked matrix.
    """
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (_ROWS, _COLUMNS // 2), dtype=torch.uint8, generator=generator)
    scales = torch.rand(_COLUMNS // GROUP, _ROWS, generator=generator).add(0.5).bfloat16()
    codes = torch.stack([packed >> 4, packed & 0xF], dim=-1).view(_ROWS, _COLUMNS).int()
    matrix = torch.tensor(_CODES)[codes] * scales.float().T.repeat_interleave(GROUP, dim=1)
    in_order = pack_for_kernel(packed)
    compare(lambda inputs: fused_nf4_product(inputs, in_order, scales), matrix)


def check_packed() -> None:
    """oneDNN's product by a bfloat16 matrix in its own order.

    Raises:
        ModelError: its numbers are others than those of the matrix as it is.
    """
    matrix = torch.randn(_ROWS, _COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()
    compare(pack_matrix(Dense(matrix)), matrix.float())


def compare(product: Linear | Callable[[torch.Tensor], torch.Tensor], matrix: torch.Tensor) -> None:
    """Raise ModelError where `product` of bfloat16 (tokens, in) is not that with float32 `matrix` (out, in)."""
    for tokens in _TOKENS:
        inputs = torch.randn(tokens, matrix.shape[1], generator=torch.Generator().manual_seed(tokens)).bfloat16()
        expected = inputs.float() @ matrix.T
        error = float((product(inputs).float() - expected).norm() / expected.norm())
        if not error < _MOST_ERROR:
            raise ModelError(f"a product of {tokens} rows is off by {error:.0%} of its size")
