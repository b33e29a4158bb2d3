"""Whatever the folders hold and whatever the form, the decoder computes the model that was trained."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from cqlora.base import CARD, read_card
from cqlora.config.schema import ModelConfig
from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.errors import ConfigError
from cqlora.inference.form import Form, Layout
from cqlora.inference.kernel import has_fused_nf4
from cqlora.inference.linear import Dense, FusedNf4, Packed
from cqlora.inference.opening import Request, open_decoder
from cqlora.model.tiny import build_tiny
from tests.cards import change_card
from tests.inference.conftest import TEXTS, build_adapter, build_base, load_stock, peft_model

CPU = torch.device("cpu")
IDS = list(range(20, 120))
ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "some layers, patterns": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}},
    "rows": {"trainable_token_indices": {"embed_tokens": [30, 31], "lm_head": [30, 31]}},
    "low-rank embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole matrices": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def ours(folder: Path, base: Path | None, quantization: str = "auto", dtype: str = "float32") -> torch.Tensor:
    decoder, _ = open_decoder(Request(folder, base, quantization, dtype, cache=False, device=CPU))
    return decoder.all_logits(IDS)


def theirs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]


@pytest.mark.parametrize("quantized", [False, True], ids=["16-bit", "nf4"])
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_float32_logits_are_those_that_peft_computes(options, quantized, base, tmp_path):
    folder = build_adapter(base, tmp_path / "adapter", quantized, **options)
    expected = theirs(peft_model(base, folder, quantized))
    torch.testing.assert_close(ours(folder, base), expected, atol=1e-4, rtol=1e-4)


def test_rows_of_a_tied_base_count_for_its_output_too(tmp_path):
    base = build_base(tmp_path / "base", tied=True)
    folder = build_adapter(base, tmp_path / "adapter", trainable_token_indices={"embed_tokens": [30, 31]})
    torch.testing.assert_close(ours(folder, base), theirs(peft_model(base, folder)), atol=1e-4, rtol=1e-4)


def test_base_with_adapter_and_merged_model_are_one(base, adapter, merged):
    torch.testing.assert_close(ours(adapter, base), ours(merged, None), atol=1e-5, rtol=1e-4)


def test_a_merged_model_is_quantised_only_where_asked_for(merged):
    torch.testing.assert_close(ours(merged, None), theirs(load_stock(merged)), atol=1e-4, rtol=1e-4)
    quantized = load_stock(merged, quantized=True).train()
    torch.testing.assert_close(ours(merged, None, "nf4"), theirs(quantized), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours(merged, None, "nf4"), ours(merged, None), atol=1e-2)


def test_an_nf4_folder_is_read_as_it_is(merged, tmp_path):
    quantized = load_stock(merged, quantized=True)
    quantized.save_pretrained(tmp_path / "nf4")
    (tmp_path / "nf4" / "tokenizer.json").write_bytes((merged / "tokenizer.json").read_bytes())
    torch.testing.assert_close(ours(tmp_path / "nf4", None), ours(merged, None, "nf4"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["k_proj", "down_proj"]}], ids=str)
def test_the_fused_form_is_the_float32_one_within_bfloat16(options, base, tmp_path):
    if not has_fused_nf4():
        pytest.skip("this processor or bitsandbytes has no fused NF4 product")
    folder = build_adapter(base, tmp_path / "adapter", quantized=True, **options)
    request = Request(folder, base, "auto", "auto", cache=False, device=CPU)
    decoder, form = open_decoder(request)
    assert form == Form(Layout.fused_nf4, torch.bfloat16, CPU)
    assert isinstance(decoder.weights.layers[0].gate_up, FusedNf4)
    expected = ours(folder, base)
    error = (decoder.all_logits(IDS) - expected).norm() / expected.norm()
    assert error < 0.02, f"bfloat16 has eight bits; the logits differ by {error:.3f} of their size"


def test_matrices_whose_groups_lie_across_rows_are_quantised_as_in_training(tmp_path):
    """176 columns are no multiple of NF4's 64."""
    shape = ModelConfig(
        name="odd", path=str(tmp_path / "odd"), vocab_size=448, hidden_size=64, intermediate_size=176,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    base = build_tiny(shape, TEXTS, CHAT_TEMPLATE)
    folder = build_adapter(base, tmp_path / "adapter", quantized=True)
    decoder, form = open_decoder(Request(folder, base, "auto", "auto", cache=False, device=CPU))
    assert form.layout is Layout.dense and isinstance(decoder.weights.layers[0].down, Dense | Packed)
    expected = theirs(peft_model(base, folder, quantized=True))
    torch.testing.assert_close(ours(folder, base), expected, atol=1e-4, rtol=1e-4)


def test_the_base_of_an_adapter_without_a_card_is_taken_as_it_is_with_a_warning(base, nf4_adapter, tmp_path, caplog):
    folder = Path(shutil.copytree(nf4_adapter, tmp_path / "foreign"))
    (folder / CARD).unlink()
    with caplog.at_level(logging.WARNING, "cqlora"):
        logits = ours(folder, base)
    assert "does not say how its base was held in training" in caplog.text
    torch.testing.assert_close(logits, theirs(peft_model(base, folder)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(folder, base, "nf4"), ours(nf4_adapter, base), atol=1e-5, rtol=1e-5)


def test_nf4_beneath_an_adapter_that_pissa_trained_is_refused(base, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "pissa"))
    change_card(folder, trained_on=read_card(folder)["trained_on"] | {"method": "pissa"})
    with pytest.raises(ConfigError, match=r"trained by PiSSA .* use quantization=none"):
        ours(folder, base, "nf4")
    torch.testing.assert_close(ours(folder, base), ours(folder, base, "none"))
