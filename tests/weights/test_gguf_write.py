"""A GGUF file read back by transformers and by our own reader is the model, its tokenizer and its template."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cqlora.config.choices import GgufType, ModelFormat
from cqlora.data.tokenizer import PlainTokenizer
from cqlora.errors import ModelError
from cqlora.weights.gguf import GgufModel
from cqlora.weights.gguf_tokenizer import write_gguf_tokenizer
from tests.vocab.bases import write_base
from tests.weights.adapters import load, logits, write_adapter, write_tiny_base
from tests.weights.test_merge import edit, merge

MIXED = "长江 is 1234 km?  <|im_end|>\n\tÄöü 你好，世界！it's"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind, tolerance", [(GgufType.f16, 0.02), (GgufType.q8_0, 0.2)], ids=["f16", "q8_0"])
def test_transformers_reads_the_file_as_the_merged_model(tied, kind, tolerance, tmp_path):
    base = write_tiny_base(tmp_path / "base", tied)
    adapter = write_adapter(base, tmp_path / "adapter")
    merged = merge(base, [adapter], tmp_path / "merged")
    output = merge(base, [adapter], tmp_path / "gguf", format=ModelFormat.gguf, gguf_type=kind)
    name = f"gguf.{kind.value}.gguf"
    assert {file.name for file in output.iterdir()} == {name, "Modelfile", "README.md", "cqlora.json"}
    read = AutoModelForCausalLM.from_pretrained(output, gguf_file=name, dtype=torch.float32).eval()
    expected = logits(load(merged))
    assert (logits(read) - expected).abs().max() < tolerance * expected.std()
    assert read.config.tie_word_embeddings is tied
    again = GgufModel(output / name)
    assert all(
        again.specs[name].shape == tensor.shape for name, tensor in read.state_dict().items() if name in again.specs
    )
    if kind is GgufType.f16:
        state = load(merged).state_dict()
        for name in again.specs:
            assert torch.equal(torch.cat(list(again.blocks(name))), state[name].half()), name
    config = json.loads((merged / "config.json").read_text())
    ours = again.config()
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size", "eos_token_id"):
        assert ours[key] == config.get(key, ours[key]), key


@pytest.mark.parametrize("kind", ["pieces", "ranks"])
def test_the_tokenizer_comes_back_with_a_token_for_every_row(kind, tmp_path):
    base = write_base(tmp_path / "base", kind, tied=kind == "ranks")
    config = json.loads((base / "config.json").read_text())
    output = merge(base, [], tmp_path / "gguf", format=ModelFormat.gguf)
    model = GgufModel(output / "gguf.f16.gguf")
    assert len(model.field("tokenizer.ggml.tokens")) == config["vocab_size"]
    assert model.field("tokenizer.ggml.bos_token_id") == config["bos_token_id"]
    assert model.field("tokenizer.ggml.add_bos_token") is True
    assert model.field("tokenizer.ggml.pre") == {"pieces": "default", "ranks": "llama-bpe"}[kind]
    (tmp_path / "back").mkdir()
    write_gguf_tokenizer(model, tmp_path / "back")
    before, after = (PlainTokenizer(folder).text for folder in (base, tmp_path / "back"))
    assert before.encode(MIXED, add_special_tokens=False).ids == after.encode(MIXED, add_special_tokens=False).ids
    if kind == "ranks":
        factors = [tensor for tensor in _tensors(output / "gguf.f16.gguf") if tensor.name == "rope_freqs.weight"]
        assert len(factors) == (config["rope_parameters"]["rope_type"] == "llama3")


def test_padding_rows_are_marked_unused_and_the_template_goes_along(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(write_tiny_base(tmp_path / "small"), base)
    model = load(base)
    model.resize_token_embeddings(384, mean_resizing=False)
    model.save_pretrained(base)
    output = merge(base, [], tmp_path / "gguf", format=ModelFormat.gguf, gguf_type=GgufType.q8_0)
    file = GgufModel(output / "gguf.q8_0.gguf")
    tokens, types = (file.field(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    size = len(AutoTokenizer.from_pretrained(base))
    assert tokens[size:] == [f"[PAD{row}]" for row in range(size, 384)] and set(types[size:]) == {5}
    assert types[tokens.index("<|im_end|>")] == 3
    assert file.field("tokenizer.chat_template") == (base / "chat_template.jinja").read_text()
    assert (logits(AutoModelForCausalLM.from_pretrained(output, gguf_file=file.file.name)) - logits(model)).std() < 0.01


@pytest.mark.parametrize(
    "changed, words",
    [
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 16}},
            "this model has beta_fast=16",
        ),
        (
            {"model_type": "granite", "residual_multiplier": 0.22},
            "a granite model; format=gguf writes llama, mistral, qwen2, qwen3 and smollm3 only",
        ),
        ({"vocab_size": 100}, r"config\.json asks for \[100, 64\]"),
    ],
)
def test_what_the_format_cannot_say_is_refused(changed, words, tmp_path):
    base = write_tiny_base(tmp_path / "base")
    edit(base / "config.json", **changed)
    with pytest.raises(ModelError, match=words):
        merge(base, [], tmp_path / "gguf", format=ModelFormat.gguf)
    assert {file.name for file in tmp_path.iterdir()} == {"base"}


def test_an_unknown_splitting_rule_is_refused(tmp_path):
    base = write_tiny_base(tmp_path / "base")
    edit(base / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]})  # fmt: skip
    with pytest.raises(ModelError, match="no known name in GGUF"):
        merge(base, [], tmp_path / "gguf", format=ModelFormat.gguf)


def test_numbers_beyond_float16_are_refused_and_q8_0_holds_them(tmp_path):
    base = write_tiny_base(tmp_path / "base")
    model = load(base)
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = 1e5
    model.save_pretrained(base)
    with pytest.raises(ModelError, match=r"up_proj\.weight does not fit in float16"):
        merge(base, [], tmp_path / "gguf", format=ModelFormat.gguf)
    file = merge(base, [], tmp_path / "gguf", format=ModelFormat.gguf, gguf_type=GgufType.q8_0) / "gguf.q8_0.gguf"
    assert max(
        np.abs(tensor.data[..., :2].view(np.float16)).max() for tensor in _tensors(file) if "ffn_up" in tensor.name
    )


def _tensors(file):
    from gguf import GGUFReader

    return GGUFReader(file).tensors
