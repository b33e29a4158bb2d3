"""Conversion from Meta's layout: exact, streaming, whole or not at all, and errors that name the file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cqlora.errors import ConfigError, ModelError
from cqlora.system.durable import staged_folder
from cqlora.vocab.config import VocabConfig
from cqlora.weights.convert import convert
from cqlora.weights.meta import MetaCheckpoint, list_shards
from tests.weights.meta_reference import (
    Shape,
    forward,
    random_state,
    write_checkpoint,
    write_pieces,
    write_ranks,
)

FAMILIES = {
    "llama": (Shape(vocab=0), 1, 1),
    "llama, two ranks": (Shape(vocab=0), 2, 1),
    "llama2, grouped queries, two ranks": (Shape(vocab=0, kv_heads=2, eps=1e-5), 2, 1),
    "llama3, grouped queries, two ranks": (Shape(vocab=0, kv_heads=2, eps=1e-5, theta=500000.0), 2, 0),
    "llama3.1, scaled frequencies": (Shape(vocab=0, kv_heads=2, eps=1e-5, theta=500000.0, scaled=True), 1, 0),
    "llama3.2, tied": (Shape(vocab=0, kv_heads=2, eps=1e-5, theta=500000.0, scaled=True, tied=True), 1, 0),
}


def write_model(folder: Path, family: str) -> tuple[Shape, dict[str, torch.Tensor]]:
    """A checkpoint of a family with its tokenizer."""
    shape, ranks, embedding_cut = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    write = write_ranks if "llama3" in family else write_pieces
    tokens = write(folder / "tokenizer.model")
    shape = Shape(**{field: getattr(shape, field) for field in shape.__slots__} | {"vocab": tokens})
    state = random_state(shape, torch.bfloat16 if "llama3" in family else torch.float16)
    write_checkpoint(folder, shape, state, ranks, embedding_cut)
    return shape, state


def convert_here(input_dir: Path, output_dir: Path, size: str = "", shard: int = 10**9) -> None:
    """Convert without a new vocabulary."""
    convert(input_dir, output_dir, size, "auto", shard, VocabConfig())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_a_forward_pass_in_metas_layout(family: str, tmp_path: Path) -> None:
    shape, state = write_model(tmp_path / "raw", family)
    convert_here(tmp_path / "raw", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    ids = torch.randint(shape.vocab, (24,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    expected = forward(shape, state, ids)
    # transformers computes rotary angles in float32, whatever the model's type.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_tied_model_stores_one_matrix(tmp_path: Path) -> None:
    write_model(tmp_path / "raw", "llama3.2, tied")
    convert_here(tmp_path / "raw", tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]["factor"] == 32.0


def test_output_stored_twice_is_recognised_as_tied(tmp_path: Path) -> None:
    shape, state = write_model(tmp_path / "raw", "llama3.2, tied")
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    write_checkpoint(tmp_path / "raw", shape, state)
    assert MetaCheckpoint(tmp_path / "raw").tied


@pytest.mark.parametrize(
    ("family", "positions"),
    [("llama", 2048), ("llama2, grouped queries, two ranks", 4096), ("llama3.1, scaled frequencies", 131072)],
)
def test_positions_follow_the_generation(family: str, positions: int, tmp_path: Path) -> None:
    write_model(tmp_path / "raw", family)
    convert_here(tmp_path / "raw", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == positions


def test_small_shards_and_index_hold_the_same_tensors(tmp_path: Path) -> None:
    write_model(tmp_path / "raw", "llama")
    convert_here(tmp_path / "raw", tmp_path / "one")
    convert_here(tmp_path / "raw", tmp_path / "many", shard=20_000)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], whole[name])
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")


def test_llama3_tokenizer_equals_tiktoken(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    from cqlora.vocab.fast import LLAMA3_SPLIT, llama3_specials, read_ranks

    write_model(tmp_path / "raw", "llama3.1, scaled frequencies")
    convert_here(tmp_path / "raw", tmp_path / "out")
    ranks = read_ranks(tmp_path / "raw" / "tokenizer.model")
    specials = {name: len(ranks) + i for i, name in enumerate(llama3_specials(llama31=True))}
    reference = tiktoken.Encoding("t", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=specials)
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(specials) == 256
    assert specials["<|eot_id|>"] == len(ranks) + 9
    for text in ("The quick dog's 12345 pieces\n\n  of text", "天气不错，公园。 \t x", "<|eot_id|>hi"):
        assert fast.encode(text, add_special_tokens=False) == reference.encode(text, allowed_special="all")
    assert fast("hi").input_ids[0] == specials["<|begin_of_text|>"]


def test_llama_tokenizer_equals_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    write_model(tmp_path / "raw", "llama")
    convert_here(tmp_path / "raw", tmp_path / "out")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "raw" / "tokenizer.model"))
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("The quick  fox,\n\ttabs", " 今天天气 龘 😀", "", "dog"):
        assert fast.encode(text) == [1, *reference.encode(text)]
        assert fast.decode(fast.encode(text), skip_special_tokens=True) == text


def test_parent_folder_with_model_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "raw" / "30B", "llama")
    (tmp_path / "raw" / "30B" / "tokenizer.model").rename(tmp_path / "raw" / "tokenizer.model")
    monkeypatch.setitem(__import__("cqlora.weights.convert", fromlist=["SIZES"]).SIZES, "30B", (32, 2, 4))
    convert_here(tmp_path / "raw", tmp_path / "out", size="33B")
    assert (tmp_path / "out" / "config.json").is_file()


def test_size_mismatch_names_both(tmp_path: Path) -> None:
    write_model(tmp_path / "raw", "llama")
    with pytest.raises(ModelError, match=r"65B has .*\(8192, 80, 64\), but .* \(32, 2, 4\)"):
        convert_here(tmp_path / "raw", tmp_path / "out", size="65B")
    with pytest.raises(ConfigError, match="66B"):
        convert_here(tmp_path / "raw", tmp_path / "out", size="66B")
    assert not (tmp_path / "out").exists()


def test_missing_file_in_the_middle_and_at_the_end_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "raw", "llama, two ranks")
    (tmp_path / "raw" / "consolidated.01.pth").rename(tmp_path / "aside")
    with pytest.raises(ModelError, match=r"consolidated\.01\.pth is missing"):
        MetaCheckpoint(tmp_path / "raw")
    (tmp_path / "aside").rename(tmp_path / "raw" / "consolidated.02.pth")
    with pytest.raises(ModelError, match=r"consolidated\.01\.pth is missing"):
        list_shards(tmp_path / "raw")


def test_surplus_file_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "raw", "llama, two ranks")
    (tmp_path / "raw" / "consolidated.02.pth").write_bytes((tmp_path / "raw" / "consolidated.01.pth").read_bytes())
    with pytest.raises(ModelError, match=r"consolidated\.02\.pth is surplus"):
        MetaCheckpoint(tmp_path / "raw")


def test_truncated_file_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "raw", "llama, two ranks")
    file = tmp_path / "raw" / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ModelError, match=r"consolidated\.01\.pth cannot be read"):
        convert_here(tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "raw", "llama")
    torch.save({"x": print}, tmp_path / "raw" / "consolidated.00.pth")
    with pytest.raises(ModelError, match="cannot be read"):
        MetaCheckpoint(tmp_path / "raw")


def test_params_of_another_model_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "raw", "llama")
    params = json.loads((tmp_path / "raw" / "params.json").read_text())
    (tmp_path / "raw" / "params.json").write_text(json.dumps(params | {"n_layers": 3}))
    with pytest.raises(ModelError, match=r"lacks layers\.2"):
        MetaCheckpoint(tmp_path / "raw")
    (tmp_path / "raw" / "params.json").write_text(json.dumps(params | {"n_kv_heads": 2}))
    with pytest.raises(ModelError, match=r"wk\.weight is \(32, 32\) where params\.json asks for \(16, 32\)"):
        MetaCheckpoint(tmp_path / "raw")


def test_interrupted_conversion_leaves_nothing_that_loads(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out") as staging:
        (staging / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_conversion_left_is_started_over(tmp_path: Path) -> None:
    write_model(tmp_path / "raw", "llama")
    left = tmp_path / ".out.0123456789abcdef.partial"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    convert_here(tmp_path / "raw", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == ["model.safetensors"]
    assert not left.exists()


def test_existing_folder_is_kept(tmp_path: Path) -> None:
    write_model(tmp_path / "raw", "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="already there"):
        convert_here(tmp_path / "raw", tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
