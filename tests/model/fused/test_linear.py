"""The fused LoRA layer against PEFT's own forward and gradients, and against what PEFT saves and merges."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from cqlora.model.fused.linear import FusedLinear, FusedLinear4bit, fuse_lora_linears

VOCABULARY = 64
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mlp_bias=True,
        attention_bias=True,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load_base(folder: Path, quantized: bool, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization if quantized else None
    )


def adapt(base: nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, **options)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (2, 12))
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().tanh().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], stock: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], stock[0], **TOLERANCE)
    assert ours[1].keys() == stock[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, stock[1][name], **TOLERANCE)


@pytest.mark.parametrize("quantized", [True, False], ids=["nf4", "unquantised"])
@pytest.mark.parametrize("rslora", [True, False], ids=["rslora", "lora"])
def test_logits_and_gradients_equal_peft(base_dir: Path, quantized: bool, rslora: bool) -> None:
    model = adapt(load_base(base_dir, quantized), use_rslora=rslora)
    stock = run(model)
    assert fuse_lora_linears(model) == 2 * len(LAYERS)
    assert_same(run(model), stock)


def test_gradients_equal_peft_with_activation_checkpointing(base_dir: Path) -> None:
    model = adapt(load_base(base_dir, quantized=True))
    stock = run(model)
    fuse_lora_linears(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(model), stock)


def test_gradients_reach_a_trained_embedding_below(base_dir: Path) -> None:
    model = adapt(load_base(base_dir, quantized=True), trainable_token_indices=[5, 6, 7])
    stock = run(model)
    fuse_lora_linears(model)
    fused = run(model)
    assert any("trainable_tokens_delta" in name for name in fused[1])
    assert_same(fused, stock)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16 base"])
def test_bfloat16_is_as_close_to_float32_as_peft_s_own(base_dir: Path, autocast: bool) -> None:
    exact = run(adapt(load_base(base_dir, quantized=True)))
    model = adapt(load_base(base_dir, True, torch.float32 if autocast else torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        stock = run(model)
        fuse_lora_linears(model)
        fused = run(model)
    assert distance(fused[0], exact[0]) < 1.5 * distance(stock[0], exact[0]) < 0.05
    for name, gradient in fused[1].items():
        assert gradient.dtype is torch.float32
        assert distance(gradient, exact[1][name]) < 2 * distance(stock[1][name], exact[1][name]) < 0.2, name


def distance(tensor: Tensor, expected: Tensor) -> Tensor:
    """Relative, in the Euclidean norm."""
    return (tensor.float() - expected).norm() / expected.norm()


def test_training_after_an_evaluation_has_the_same_gradients_as_before(base_dir: Path) -> None:
    """bitsandbytes repacks weights at an evaluation on some processors, and those have no backward pass."""
    model = adapt(load_base(base_dir, quantized=True))
    fuse_lora_linears(model)
    before = run(model)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    after = run(model.train())
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(after[1][name], gradient) for name, gradient in before[1].items())


@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}],
    ids=["dropout", "DoRA", "bias"],
)
def test_what_is_more_than_a_low_rank_product_keeps_the_stock_forward(base_dir: Path, options: dict[str, Any]) -> None:
    model = adapt(load_base(base_dir, quantized=False), **options)
    assert fuse_lora_linears(model) == 0


def test_a_disabled_adapter_gives_the_base(base_dir: Path) -> None:
    base = load_base(base_dir, quantized=True)
    ids = torch.arange(12)[None]
    expected = base(input_ids=ids).logits
    model = adapt(base)
    fuse_lora_linears(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, expected, **TOLERANCE)


def test_a_second_adapter_returns_the_layers_to_the_stock_forward(base_dir: Path) -> None:
    model = adapt(load_base(base_dir, quantized=True))
    fuse_lora_linears(model)
    first = run(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=LAYERS))
    assert_same(run(model), first)
    model.set_adapter("second")
    assert any("second" in name for name in run(model)[1])


def test_the_saved_adapter_is_peft_s_own(base_dir: Path, tmp_path: Path) -> None:
    model = adapt(load_base(base_dir, quantized=True))
    names = [name for name, _ in model.named_parameters()]
    fuse_lora_linears(model)
    assert [name for name, _ in model.named_parameters()] == names
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_base(base_dir, quantized=True), tmp_path, is_trainable=True)
    assert_same(run(model), run(loaded.train()))


def test_merging_a_fused_model_equals_running_it(base_dir: Path) -> None:
    model = adapt(load_base(base_dir, quantized=False)).eval()
    fuse_lora_linears(model)
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    assert not any(isinstance(module, FusedLinear | FusedLinear4bit) for module in merged.modules())
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, **TOLERANCE)


def test_only_the_input_and_its_projection_are_kept() -> None:
    base = nn.Sequential(nn.Linear(32, 48, bias=False))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"]))
    fuse_lora_linears(model)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(10, 32, requires_grad=True))
    assert kept == [(10, 32), (10, 4)]


def test_a_weight_that_lost_its_statistics_to_sharding_is_read_by_the_module_s(base_dir: Path) -> None:
    model = adapt(load_base(base_dir, quantized=True))
    fuse_lora_linears(model)
    expected = run(model)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            plain = module.weight.data.clone()
            del module.weight
            module.weight = nn.Parameter(plain, requires_grad=False)
    assert_same(run(model), expected)
