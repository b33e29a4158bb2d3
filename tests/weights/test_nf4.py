"""NF4 made and undone in blocks of rows is bit for bit what bitsandbytes makes of the whole matrix."""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cqlora.config.choices import ModelFormat, Precision
from cqlora.weights import nf4
from cqlora.weights.nf4 import Nf4Format, dequantise, quantise
from tests.weights.adapters import load, logits, write_adapter, write_tiny_base
from tests.weights.test_merge import merge


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(400, 128), (70, 192), (5, 52)])
def test_blocks_of_rows_give_what_the_whole_matrix_gives(double, dtype, shape, monkeypatch):
    monkeypatch.setattr(nf4, "rows_together", lambda columns: 64)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    matrix = quantise(lambda: iter(weight.split(37)), shape, Nf4Format(double, dtype))
    packed, state = quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=double)
    assert torch.equal(matrix.packed, packed)
    ours, theirs = matrix.state.as_dict(packed=True), state.as_dict(packed=True)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(torch.cat(list(dequantise(matrix))), dequantize_4bit(packed, state).float())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_an_nf4_folder_loads_plainly_and_answers_as_the_merged_one_quantised_on_loading(tied, double, stored, tmp_path):
    base = write_tiny_base(tmp_path / "base", tied)
    load(base).to(stored).save_pretrained(base)
    adapter = write_adapter(base, tmp_path / "adapter")
    sixteen = merge(base, [adapter], tmp_path / "sixteen")
    form = {"format": ModelFormat.nf4, "double_quantization": double, "precision": Precision.float32}
    folder = merge(base, [adapter], tmp_path / "nf4", **form)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    on_loading = load(sixteen, quantization_config=quantization)
    # Before a forward pass, which may repack the weights for the processor at hand.
    on_loading.save_pretrained(tmp_path / "theirs")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert plain.model.layers[1].mlp.up_proj.weight.dtype == torch.uint8
    assert plain.model.embed_tokens.weight.dtype == plain.dtype == torch.float32
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is tied
    assert torch.equal(logits(plain), logits(on_loading))
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    states = [name for name in ours if "quant_state" in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name not in states)
    for name in states:
        assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(theirs[name].tolist()))


def test_a_base_alone_becomes_an_nf4_folder(tmp_path):
    base = write_tiny_base(tmp_path / "base")
    folder = merge(base, [], tmp_path / "nf4", format=ModelFormat.nf4, precision=Precision.float32)
    apart = logits(load(base)) - logits(AutoModelForCausalLM.from_pretrained(folder).eval())
    assert 0 < apart.abs().mean() < 0.1
