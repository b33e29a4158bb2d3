"""The fused product and its order of bytes are those of bitsandbytes."""

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit, quantize_4bit

from cqlora.inference.kernel import find_fused_nf4, fused_nf4_product
from cqlora.inference.linear import Dense, Packed, pack_dense, pack_for_kernel
from cqlora.inference.nf4_parts import quantise_rows
from cqlora.weights.nf4 import Nf4Format

ROWS, COLUMNS = 96, 128


@pytest.fixture
def matrix() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(ROWS, COLUMNS)


@pytest.mark.parametrize("double", [True, False])
def test_the_parts_of_a_matrix_are_what_bitsandbytes_makes_of_it(matrix, double):
    packed, state = quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=double)
    parts = quantise_rows(lambda: iter([matrix]), (ROWS, COLUMNS), Nf4Format(double, torch.float32))
    assert torch.equal(parts.packed.flatten(), packed.flatten())
    torch.testing.assert_close(parts.dense(), dequantize_4bit(packed, state), atol=1e-6, rtol=1e-6)


def test_the_kernels_order_is_that_of_bitsandbytes(matrix):
    packed, state = quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    ours = pack_for_kernel(packed.view(ROWS, COLUMNS // 2))
    theirs, _ = _convert_weight_packed_for_cpu(packed, state)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tokens", [1, 3, 8, 40])
def test_the_fused_product_is_the_product(matrix, tokens):
    if find_fused_nf4() is None:
        pytest.skip("this processor or bitsandbytes has no fused NF4 product")
    parts = quantise_rows(lambda: iter([matrix]), (ROWS, COLUMNS), Nf4Format(True, torch.float32))
    inputs = torch.randn(tokens, COLUMNS).bfloat16()
    scales = parts.scales.view(ROWS, -1).T.to(torch.bfloat16).contiguous()
    found = fused_nf4_product(inputs, pack_for_kernel(parts.packed), scales)
    expected = inputs.float() @ parts.dense().T
    assert (found.float() - expected).norm() / expected.norm() < 0.01


def test_a_packed_matrix_gives_a_row_the_same_bits_in_any_batch_and_those_of_the_product(matrix):
    packed = pack_dense(Dense(matrix.bfloat16()))
    if not isinstance(packed, Packed):
        pytest.skip("this processor multiplies no bfloat16 numbers")
    inputs = torch.randn(40, COLUMNS)
    together = packed(inputs)
    expected = inputs.bfloat16().float() @ matrix.bfloat16().float().T
    assert (together - expected).norm() / expected.norm() < 0.003
    assert all(torch.equal(packed(inputs[:rows]), packed(inputs[:16])[:rows]) for rows in range(1, 17))


def test_a_float32_matrix_stays_as_it_is(matrix):
    dense = Dense(matrix)
    assert pack_dense(dense) is dense
