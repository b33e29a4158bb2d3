"""Each kernel against the plain formula, interpreted in float32; and plain gradients against autograd's."""

import importlib
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import quantize_4bit
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cqlora.model.fused import plain
from tests.model.fused.interpreted import interpret_kernels

TOLERANCE = {"atol": 2e-6, "rtol": 2e-6}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return interpret_kernels(monkeypatch)


def random(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(rows: int, width: int) -> tuple[Tensor, Tensor]:
    turns = random(rows, width // 2, seed=7).repeat(1, 2)
    return turns.cos(), turns.sin()


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", [(4, 64), (48, 704)], ids=["part", "several programs"])
def test_matrices_of_4_bits_are_bitsandbytes_own(
    kernels: ModuleType, shape: tuple[int, int], double: bool, storage: torch.dtype
) -> None:
    options = {"compress_statistics": double, "quant_type": "nf4", "quant_storage": storage}
    packed, state = quantize_4bit(random(*shape), **options)
    assert state.nested == double
    torch.testing.assert_close(kernels.dequantize(packed, state), plain.dequantize(packed, state), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 8), (3, 1024), (5, 411)], ids=["part", "whole", "whole and part"])
def test_gates_equal_the_plain_formula_where_they_fill_a_program_and_where_not(
    kernels: ModuleType, shape: tuple[int, int]
) -> None:
    gate, up = random(*shape), random(*shape, seed=1)
    torch.testing.assert_close(kernels.multiply_gate(gate, up), plain.multiply_gate(gate, up), **TOLERANCE)


def test_a_gate_far_from_zero_is_open_or_shut(kernels: ModuleType) -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    ones = torch.ones_like(gate)
    expected = torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]])
    assert torch.equal(kernels.multiply_gate(gate, ones), expected)
    _, grad_gate, _ = kernels.differentiate_gate(ones.clone(), gate, ones)
    assert grad_gate.tolist() == [[0.0, 0.0, 0.5, 1.0, 1.0]]


@pytest.mark.parametrize("choice", ["plain", "kernels"])
def test_gradients_of_gates_equal_autograd_s(choice: str, request: pytest.FixtureRequest) -> None:
    ours = plain if choice == "plain" else request.getfixturevalue("kernels")
    gate, up = random(5, 411).requires_grad_(), random(5, 411, seed=1).requires_grad_()
    grad = random(5, 411, seed=2)
    expected = F.silu(gate) * up
    expected.backward(grad)
    product, grad_gate, grad_up = ours.differentiate_gate(grad.clone(), gate.detach(), up.detach())
    for found, wanted in ((product, expected), (grad_gate, gate.grad), (grad_up, up.grad)):
        torch.testing.assert_close(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("choice", ["plain", "kernels"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=["each", "grouped", "odd"])
@pytest.mark.parametrize("width", [8, 12])
def test_rotations_equal_transformers(
    choice: str, heads: tuple[int, int], width: int, request: pytest.FixtureRequest
) -> None:
    ours = plain if choice == "plain" else request.getfixturevalue("kernels")
    rows, repeats = 5, 2
    cos, sin = angles(rows, width)
    query, key = (random(rows * repeats, count * width, seed=count) for count in heads)
    laid_out = [each.view(repeats, rows, -1, width).transpose(1, 2) for each in (query, key)]
    expected = apply_rotary_pos_emb(*laid_out, cos[None], sin[None])
    expected = [each.transpose(1, 2).reshape(rows * repeats, -1) for each in expected]
    before = query.clone(), key.clone()
    ours.rotate(query, key, cos, sin)
    torch.testing.assert_close((query, key), tuple(expected), **TOLERANCE)
    ours.rotate(query, key, cos, sin, back=True)
    torch.testing.assert_close((query, key), before, **TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled kernels run on a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_equal_the_plain_formula_in_float32_and_round_no_worse_in_16_bits(dtype: torch.dtype) -> None:
    kernels = importlib.import_module("cqlora.model.fused.kernels")
    packed, state = quantize_4bit(random(704, 512).to("cuda", dtype), compress_statistics=True, quant_type="nf4")
    torch.testing.assert_close(kernels.dequantize(packed, state), plain.dequantize(packed, state))
    grad, gate, up = (random(300, 1408, seed=seed).to("cuda", dtype) for seed in range(3))
    cos, sin = (each.to("cuda", dtype) for each in angles(150, 128))
    query, key = (random(300, heads * 128, seed=heads).to("cuda", dtype) for heads in (32, 8))

    def compute(choice: ModuleType, kind: torch.dtype) -> list[Tensor]:
        turned = [each.to(kind, copy=True) for each in (query, key)]
        choice.rotate(*turned, cos.to(kind), sin.to(kind))
        gates = choice.differentiate_gate(grad.to(kind, copy=True), gate.to(kind), up.to(kind))
        return [choice.multiply_gate(gate.to(kind), up.to(kind)), *gates, *turned]

    exact = compute(plain, torch.float32)
    for ours, stock, wanted in zip(compute(kernels, dtype), compute(plain, dtype), exact, strict=True):
        assert ours.dtype is dtype
        assert (ours.float() - wanted).norm() <= 1.05 * (stock.float() - wanted).norm() + 2e-6 * wanted.norm()
