"""The lean feed-forward block against the stock one, in value, in gradients and in what it keeps."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from cqlora.model.fused.linear import fuse_lora_linears
from cqlora.model.fused.mlp import FusedMLP, fuse_mlps
from tests.kinds import OPTIONS

VOCABULARY, HIDDEN, INTERMEDIATE, TOKENS = 64, 32, 80, 24
LAYERS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def build_model(targets: list[str] = LAYERS, kind: str = "llama", **options: Any) -> PeftModel:
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=None,
        **options,
    )
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.arange(TOKENS).view(2, -1)
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().tanh().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], stock: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], stock[0], **TOLERANCE)
    assert ours[1].keys() == stock[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, stock[1][name], **TOLERANCE)


def fuse(model: nn.Module) -> None:
    fuse_lora_linears(model)
    assert fuse_mlps(model) == 2


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_block_of_every_kind_is_the_same_arithmetic_with_and_without_its_adapter(kind: str) -> None:
    model = build_model(kind=kind)
    ids = torch.arange(TOKENS)[None]
    stock = run(model)
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    fuse(model)
    assert_same(run(model), stock)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, base, **TOLERANCE)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "kept"])
def test_logits_and_gradients_equal_the_stock_block(bias: bool, checkpointed: bool) -> None:
    model = build_model(mlp_bias=bias)
    stock = run(model)
    fuse(model)
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(model), stock)


def test_autocast_differs_by_rounding() -> None:
    model = build_model()
    logits, gradients = run(model)
    fuse(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, rounded_gradients = run(model)
    assert (rounded.float() - logits).norm() < 0.03 * logits.norm()
    for name, gradient in rounded_gradients.items():
        assert (gradient - gradients[name]).norm() < 0.05 * gradients[name].norm(), name


def test_two_tensors_of_the_intermediate_size_are_kept() -> None:
    model = build_model()
    fuse(model)
    block = next(module for module in model.modules() if isinstance(module, FusedMLP))
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(torch.randn(1, TOKENS, HIDDEN, requires_grad=True))
    assert kept.count((TOKENS, INTERMEDIATE)) == 2
    beyond = {shape for shape in kept if shape != (TOKENS, INTERMEDIATE)}
    assert beyond == {(TOKENS, HIDDEN), (TOKENS, 4)}


class Products(TorchDispatchMode):
    """How many matrix products with a frozen matrix from the intermediate to the hidden size ran."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.count += tuple(args[-1].shape) == (INTERMEDIATE, HIDDEN) and args[-2].shape[0] == TOKENS
        return func(*args, **(kwargs or {}))


def test_activation_checkpointing_does_not_recompute_the_last_product() -> None:
    model = build_model()
    fuse(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(TOKENS).view(2, -1)
    with Products() as forward:
        logits = model(input_ids=ids, use_cache=False).logits
    with Products() as backward:
        logits.sum().backward()
    assert forward.count == 2
    # Two products of this shape a block are the gradients of the gate's and the up layer's input.
    assert backward.count == 4


def test_a_block_with_a_layer_that_is_not_fused_keeps_the_stock_forward() -> None:
    model = build_model(targets=["gate_proj", "up_proj"])
    fuse_lora_linears(model)
    assert fuse_mlps(model) == 0
    gelu = build_model(hidden_act="gelu")
    fuse_lora_linears(gelu)
    assert fuse_mlps(gelu) == 0
