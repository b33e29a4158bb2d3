"""GGUF files of the kinds of model that are not LLaMA: what `gguf` reads is the model, tensor by tensor."""

import json

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
from transformers import AutoModelForCausalLM, Qwen2Tokenizer

from cqlora.architectures import MODEL_TYPES, Part
from cqlora.config.choices import ModelFormat
from cqlora.errors import ModelError
from cqlora.weights.gguf_write import ARCHITECTURES
from tests.kinds import OPTIONS, SHAPE, write_kind
from tests.weights.adapters import attach, load, logits, write_adapter
from tests.weights.test_merge import edit, merge

KINDS = [kind for kind in OPTIONS if kind != "llama"]
NEIGHBOURS = {"mistral", "smollm3"}
"""Kinds whose query and key rows llama.cpp's converter puts in the order of neighbours (its `undo_permute`)."""


def in_neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of whole heads as llama.cpp wants them: dimension i beside i + half."""
    of_heads = rows.reshape(heads, -1, *rows.shape[1:])
    half = of_heads.shape[1] // 2
    order = np.stack([np.arange(half), np.arange(half) + half], axis=1).ravel()
    return of_heads[:, order].reshape(rows.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_reads_every_tensor_of_a_merged_model_under_llama_cpps_names(kind, tmp_path):
    base = write_kind(kind, tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter")
    state = load(merge(base, [adapter], tmp_path / "merged")).state_dict()
    output = merge(base, [adapter], tmp_path / "gguf", format=ModelFormat.gguf)
    read = GGUFReader(output / "gguf.f16.gguf")
    architecture = read.fields["general.architecture"].contents()
    assert architecture == ("llama" if kind == "mistral" else kind)
    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], SHAPE["num_hidden_layers"])
    found = {tensor.name: tensor.data for tensor in read.tensors}
    expected = {names.get_name(name, (".weight", ".bias")): (name, tensor.numpy()) for name, tensor in state.items()}
    assert found.keys() == expected.keys()
    for name, (theirs, tensor) in expected.items():
        if kind in NEIGHBOURS and theirs.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = in_neighbours(tensor, SHAPE["num_attention_heads" if ".q_" in theirs else "num_key_value_heads"])
        stored = np.float16 if tensor.ndim == 2 else np.float32
        assert found[name].dtype == stored and np.array_equal(found[name], tensor.astype(stored)), name


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_file_as_the_model_with_its_adapter(kind, tmp_path):
    # transformers' reader takes no key_length for qwen3, whose heads it has 128 wide.
    base = write_kind(kind, tmp_path / "base", **({"head_dim": 128} if kind == "qwen3" else {}))
    adapter = write_adapter(base, tmp_path / "adapter")
    output = merge(base, [adapter], tmp_path / "gguf", format=ModelFormat.gguf)
    read = AutoModelForCausalLM.from_pretrained(output, gguf_file="gguf.f16.gguf", dtype=torch.float32).eval()
    expected = logits(attach(load(base), adapter))
    assert (logits(read) - expected).abs().max() < 0.02 * expected.std()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_computes_what_the_unmerged_one_does(kind, tmp_path):
    base = write_kind(kind, tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter")
    merged = logits(load(merge(base, [adapter], tmp_path / "merged")))
    torch.testing.assert_close(merged, logits(attach(load(base), adapter)), atol=1e-4, rtol=1e-4)


def test_qwens_rule_of_splitting_is_written_under_llama_cpps_name(tmp_path):
    base = write_kind("qwen2", tmp_path / "base")
    rule = json.loads(Qwen2Tokenizer().backend_tokenizer.to_str())["pre_tokenizer"]
    edit(base / "tokenizer.json", pre_tokenizer=rule)
    file = merge(base, [], tmp_path / "gguf", format=ModelFormat.gguf) / "gguf.f16.gguf"
    assert GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == "qwen2"


REFUSED = [
    ("mistral", {"sliding_window": 16}, "within a sliding window of 16 tokens, which cqlora does not; use format=saf"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "other layers than every fourth without rotary embedding"),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}, "other layers than every fourth"),
    ("qwen3", {"attention_bias": True}, "format=gguf writes layers without bias only"),
    ("qwen3", {"model_type": "qwen3_moe", "num_experts": 8}, "qwen3_moe model, which is a mixture of experts"),
]


@pytest.mark.parametrize("kind, changed, words", REFUSED, ids=str)
def test_what_llama_cpp_would_compute_otherwise_is_refused(kind, changed, words, tmp_path):
    base = write_kind(kind, tmp_path / "base")
    edit(base / "config.json", **changed)
    with pytest.raises(ModelError, match=words):
        merge(base, [], tmp_path / "gguf", format=ModelFormat.gguf)
    assert not (tmp_path / "gguf").exists()


def test_every_kind_that_is_written_is_tested_here_or_as_llama():
    written = {kind for kind, parts in MODEL_TYPES.items() if Part.gguf in parts}
    assert written == ARCHITECTURES.keys() == OPTIONS.keys()
