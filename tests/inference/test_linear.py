"""The fused product and its order of bytes are those of bitsandbytes."""

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit, quantize_4bit

from cqlora.inference.decoder import STEADY_ROWS
from cqlora.inference.kernel import fused_nf4_product, has_fused_nf4
from cqlora.inference.linear import Dense, FusedNf4, Packed, pack_dense, pack_for_kernel
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
    if not has_fused_nf4():
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


SHAPES = [(ROWS, COLUMNS), (960, 576), (576, 1536)]
"""The last two are SmolLM2's: the library that multiplies goes another way where there is more to do."""


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "packed", "fused"])
def test_a_steady_number_of_rows_gives_a_row_the_same_bits_in_every_place_and_company(kind, rows, columns):
    layer = layer_of(kind, torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))
    row = torch.randn(columns)
    found = []
    for place in range(STEADY_ROWS):
        company = torch.randn(STEADY_ROWS, columns)
        company[place] = row
        found.append(layer(company)[place])
    assert all(torch.equal(found[0], other) for other in found[1:])


def layer_of(kind: str, matrix: torch.Tensor):
    """The matrix in a form, or a skipped test where this processor has it not."""
    if kind == "fused":
        if not has_fused_nf4():
            pytest.skip("this processor or bitsandbytes has no fused NF4 product")
        parts = quantise_rows(lambda: iter([matrix]), tuple(matrix.shape), Nf4Format(True, torch.float32))
        scales = parts.scales.view(len(matrix), -1).T.to(torch.bfloat16).contiguous()
        return FusedNf4(pack_for_kernel(parts.packed), scales, None)
    dense = Dense(matrix if kind == "float32" else matrix.bfloat16())
    layer = pack_dense(dense) if kind == "packed" else dense
    if kind == "packed" and layer is dense:
        pytest.skip("this processor multiplies no bfloat16 numbers")
    return layer


def test_a_float32_matrix_stays_as_it_is(matrix):
    dense = Dense(matrix)
    assert pack_dense(dense) is dense
