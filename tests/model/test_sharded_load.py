"""A base that is read block by block: the stock loader's numbers, and no more in memory than was read."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from cqlora.base import read_base
from cqlora.errors import ModelError
from cqlora.model.fused.linear import keep_trainable_layout
from cqlora.model.sharded_load import lay_out_base
from tests.runs import build_base

CPU = torch.device("cpu")


def nf4(storage: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, workspace, tmp_path):
    return read_base(build_base(workspace, tmp_path / "base", request.param))


def held_bytes(module: torch.nn.Module) -> int:
    """Memory behind a module's parameters, each piece once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("quantization", [None, nf4(torch.float32)], ids=["whole", "nf4"])
def test_filled_block_by_block_it_is_the_stock_loaders_model(quantization, base):
    stock = AutoModelForCausalLM.from_pretrained(
        base.path, dtype=torch.float32, quantization_config=quantization, device_map={"": CPU}
    )
    model, fill = lay_out_base(base, AutoConfig.from_pretrained(base.path), quantization, "sdpa", CPU, torch.float32)
    for block in model.model.layers:
        fill(block)
    for each in (stock, model):
        keep_trainable_layout(each)
    expected = dict(stock.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            ours, theirs = (dequantize_4bit(m.weight, m.weight.quant_state) for m in (module, expected[name]))
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, stock(tokens).logits, atol=0, rtol=0)


def test_a_block_holds_nothing_before_it_is_filled(base):
    model, fill = lay_out_base(
        base, AutoConfig.from_pretrained(base.path), nf4(torch.float32), "sdpa", CPU, torch.float32
    )
    blocks = model.model.layers
    empty = held_bytes(blocks[0])
    assert empty <= 8 * len(list(blocks[0].parameters()))
    fill(blocks[0])
    quantised = sum(m.in_features * m.out_features // 2 for m in blocks[0].modules() if isinstance(m, Linear4bit))
    assert quantised <= held_bytes(blocks[0]) <= quantised + 4096
    assert held_bytes(blocks[1]) == empty


def test_a_tensor_that_the_files_lack_is_named(base):
    file = base.path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        lay_out_base(base, AutoConfig.from_pretrained(base.path), None, "sdpa", CPU, torch.float32)
