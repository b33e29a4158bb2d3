"""Blocks with fused norms, projections and rotations against the stock ones, in value and in gradients."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from cqlora.config.choices import Kernels
from cqlora.model.attention import DOCUMENTS, document_kwargs
from cqlora.model.fused import fuse_blocks, plain
from cqlora.model.fused.attention import _FUSED, fuse_attentions
from cqlora.model.fused.linear import adapters_cast_once, fuse_lora_linears
from cqlora.model.fused.norm import FusedRMSNorm, fuse_norms
from tests.model.fused.interpreted import interpret_kernels

DOCUMENT_LENGTHS = [5, 12, 7]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None,
}  # fmt: skip
KINDS = {
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
    "smollm3": SmolLM3Config,
}  # fmt: skip


def build_model(kind: type[PretrainedConfig] = LlamaConfig, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = kind(**{**SHAPE, **options})
    base = AutoModelForCausalLM.from_config(config, attn_implementation=options.get("attn_implementation", DOCUMENTS))
    for name, parameter in base.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            nn.init.normal_(parameter, 1.0, 0.2)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(
        input_ids=torch.arange(sum(DOCUMENT_LENGTHS))[None],
        position_ids=torch.cat([torch.arange(length) for length in DOCUMENT_LENGTHS])[None],
        use_cache=False,
        **document_kwargs(DOCUMENT_LENGTHS, "cpu"),
    ).logits
    logits.float().tanh().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], stock: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], stock[0], atol=1e-5, rtol=1e-5)
    assert ours[1].keys() == stock[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, stock[1][name], atol=1e-6, rtol=1e-4)


def fuse_plainly(model: nn.Module) -> None:
    fuse_lora_linears(model)
    assert fuse_attentions(model, plain) == SHAPE["num_hidden_layers"]
    of_heads = 2 * (model.config.model_type == "qwen3")
    assert fuse_norms(model) == (2 + of_heads) * SHAPE["num_hidden_layers"] + 1


@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_logits_and_gradients_equal_the_stock_block(kind: str, checkpointed: bool) -> None:
    # Every second layer of SmolLM3 is then without rotary embedding.
    model = build_model(KINDS[kind], use_cache=False, no_rope_layer_interval=2)
    stock = run(model)
    fuse_plainly(model)
    if kind == "smollm3":
        assert [block.self_attn.use_rope for block in model.get_base_model().model.layers] == [1, 0]
    assert all(type(block.self_attn) in _FUSED.values() for block in model.get_base_model().model.layers)
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(model), stock)


def test_interpreted_kernels_give_the_stock_block_s_logits_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_kernels(monkeypatch)
    model = build_model()
    stock = run(model)
    assert fuse_blocks(model, Kernels.triton)
    assert_same(run(model), stock)


def test_eager_attention_keeps_the_stock_forward() -> None:
    model = build_model(attn_implementation="eager")
    fuse_lora_linears(model)
    assert fuse_attentions(model, plain) == 0


def test_generation_with_a_cache_equals_the_stock_block() -> None:
    model = build_model().eval()
    ids = torch.arange(6)[None]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    expected = model.generate(input_ids=ids, **options)
    fuse_plainly(model)
    assert torch.equal(model.generate(input_ids=ids, **options), expected)


def test_a_disabled_adapter_gives_the_base() -> None:
    model = build_model()
    ids = torch.arange(12)[None]
    with model.disable_adapter():
        expected = model(input_ids=ids, use_cache=False).logits
    fuse_plainly(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_input_of_queries_keys_and_values_is_kept_once() -> None:
    model = build_model(num_hidden_layers=1)
    fuse_plainly_one = fuse_lora_linears(model), fuse_attentions(model, plain)
    assert fuse_plainly_one == (len(LAYERS), 1)
    attention = model.get_base_model().model.layers[0].self_attn
    tokens, hidden, heads = sum(DOCUMENT_LENGTHS), SHAPE["hidden_size"], SHAPE["head_dim"]
    angles = torch.zeros(1, tokens, heads)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(torch.randn(1, tokens, hidden, requires_grad=True), (angles, angles))
    # Beside what the attention keeps: the input, three projections to `rank` columns, the angles; then of o_proj.
    assert kept[:6] == [(tokens, hidden), *3 * [(tokens, 4)], *2 * [(tokens, heads)]]
    assert kept[-2:] == [(tokens, hidden), (tokens, 4)]


def test_a_fused_norm_keeps_its_input_s_type_and_is_as_close_to_float32_as_the_stock_one() -> None:
    model = build_model(num_hidden_layers=1)
    norm = model.get_base_model().model.norm
    x = torch.randn(7, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(1))
    exact = norm(x)
    stock = norm.bfloat16()(x.bfloat16())
    assert fuse_norms(model) == 3
    assert type(norm) is FusedRMSNorm
    ours = norm(x.bfloat16())
    assert ours.dtype is torch.bfloat16
    assert (ours.float() - exact).norm() <= 1.1 * (stock.float() - exact).norm() < 0.01 * exact.norm()


class Casts(torch.utils._python_dispatch.TorchDispatchMode):
    """How many tensors of an adapter's shape are turned into another type."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and 4 in args[0].shape and args[0].dtype is torch.float32:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_adapters_are_cast_once_for_all_passes_of_a_step_and_gradients_stay_the_same() -> None:
    model = build_model()
    model.get_base_model().bfloat16()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert fuse_blocks(model)
    with Casts() as before:
        expected = run(model)
    with Casts() as after, adapters_cast_once(model, torch.bfloat16):
        found = run(model)
        again = run(model)
    assert before.count > 2 * len(LAYERS) and after.count == 0
    for logits, gradients in (found, again):
        assert torch.equal(logits, expected[0])
        assert all(gradient.dtype is torch.float32 for gradient in gradients.values())
        assert all(torch.equal(gradient, expected[1][name]) for name, gradient in gradients.items())


def test_a_step_between_is_seen_by_the_next_casts() -> None:
    model = build_model()
    model.get_base_model().bfloat16()
    fuse_blocks(model)
    with adapters_cast_once(model, torch.bfloat16):
        before, _ = run(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    with adapters_cast_once(model, torch.bfloat16):
        after, _ = run(model)
    assert not torch.equal(before, after)
    assert torch.equal(after, run(model)[0])
