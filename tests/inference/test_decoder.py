"""The decoder computes what transformers' LlamaForCausalLM computes, in one pass or many, alone or beside others."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cqlora.base import read_base
from cqlora.inference.architecture import read_architecture
from cqlora.inference.cache import Shelf
from cqlora.inference.decoder import Decoder, Segment
from cqlora.inference.form import Form, Layout
from cqlora.inference.weights import Model, build_weights
from cqlora.system.shards import ShardReader
from cqlora.weights.merge_plan import MergedSource, MergePlan

FLOAT32 = Form(Layout.dense, torch.float32, torch.device("cpu"))
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
SHAPES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "every head its keys": {"num_key_value_heads": 4},
    "one pair of keys": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 48},
    "llama3 positions": {"rope_parameters": LLAMA3},
    "yarn positions": {"rope_parameters": YARN},
    "yarn positions with every option": {
        "rope_parameters": YARN
        | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.8, "mscale_all_dim": 1.2, "truncate": False}
    },
    "yarn positions of a stated size": {"rope_parameters": YARN | {"attention_factor": 0.9}},
    "linear positions": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
}


def build(folder, **options) -> tuple[LlamaForCausalLM, Decoder]:
    torch.manual_seed(0)
    shape = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    stock = LlamaForCausalLM(LlamaConfig(**(shape | options), initializer_range=0.1)).eval()
    stock.save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    return stock, open_decoder(folder)


def open_decoder(folder) -> Decoder:
    base = read_base(folder)
    architecture = read_architecture(base.config, folder)
    source = MergedSource(ShardReader(folder), MergePlan(tied=base.tied), None)
    return Decoder(architecture, build_weights(Model(base, source, is_nf4=False), architecture, FLOAT32))


def stock_logits(stock, ids) -> torch.Tensor:
    with torch.no_grad():
        return stock(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_transformers(options, tmp_path):
    stock, decoder = build(tmp_path, **options)
    ids = torch.randint(0, 200, (300,)).tolist()
    torch.testing.assert_close(decoder.all_logits(ids), stock_logits(stock, ids), atol=1e-5, rtol=1e-4)


def test_older_names_of_the_configuration_mean_the_same(tmp_path):
    stock, _ = build(tmp_path, rope_parameters=LLAMA3)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {**rope, "type": rope.pop("rope_type")}
    del config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = list(range(100))
    torch.testing.assert_close(open_decoder(tmp_path).all_logits(ids), stock_logits(stock, ids), atol=1e-5, rtol=1e-4)


def test_a_prompt_in_pieces_and_tokens_one_by_one_give_what_one_pass_gives(tmp_path):
    stock, decoder = build(tmp_path)
    ids = torch.randint(0, 200, (290,)).tolist()
    expected = stock_logits(stock, ids)
    cache = decoder.new_cache()
    for first, last in ((0, 100), (100, 270), *((n, n + 1) for n in range(270, 290))):
        logits = decoder.next_logits([Segment(cache, ids[first:last])])
        torch.testing.assert_close(logits[0], expected[last - 1], atol=1e-5, rtol=1e-4)
    assert cache.length == 290


def test_sequences_of_any_lengths_share_a_pass_without_seeing_each_other(tmp_path):
    stock, decoder = build(tmp_path)
    sequences = [torch.randint(0, 200, (n,)).tolist() for n in (1, 40, 7)]
    caches = [decoder.new_cache() for _ in sequences]
    decoder.next_logits([Segment(caches[1], sequences[1][:20])])
    waiting = [sequences[0], sequences[1][20:], sequences[2]]
    rows = decoder.next_logits([Segment(cache, ids) for cache, ids in zip(caches, waiting, strict=True)])
    for row, ids in zip(rows, sequences, strict=True):
        torch.testing.assert_close(row, stock_logits(stock, ids)[-1], atol=1e-5, rtol=1e-4)


def test_short_sequences_on_a_shelf_are_computed_as_each_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("cqlora.inference.cache.SHELF_LENGTH", 24)
    stock, decoder = build(tmp_path)
    sequences = [torch.randint(0, 200, (n,)).tolist() for n in (32, 40, 13, 20)]
    lengths = [22, 35, 3, 10]
    caches, shelf = [decoder.new_cache() for _ in sequences], Shelf(4)
    for cache, ids, length in zip(caches, sequences, lengths, strict=True):
        decoder.next_logits([Segment(cache, ids[:length])])
    for step in range(5):
        shelf.arrange(caches)
        assert len(shelf.caches) == (3 if step < 2 else 2), "the first outgrows it"
        ordered = sorted(range(4), key=lambda n: shelf.caches.index(caches[n]) if caches[n] in shelf.caches else 4)
        segments = [Segment(caches[n], [sequences[n][lengths[n] + step]]) for n in ordered]
        rows = decoder.next_logits(segments, shelf=shelf)
        for row, n in zip(rows, ordered, strict=True):
            expected = stock_logits(stock, sequences[n][: lengths[n] + step + 1])[-1]
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)


def test_steady_logits_are_the_same_to_the_last_bit_in_every_batch(tmp_path):
    _, decoder = build(tmp_path)
    prompts = [torch.randint(0, 200, (n,)).tolist() for n in (5, 9, 3, 12, 6, 7)]

    def after(numbers) -> torch.Tensor:
        caches = [decoder.new_cache() for _ in numbers]
        for number, cache in zip(numbers, caches, strict=True):
            decoder.next_logits([Segment(cache, prompts[number])])
        return decoder.next_logits([Segment(cache, [17]) for cache in caches], steady=True)

    together = after(range(6))
    for numbers in ([2], [5], [4, 1], [5, 4, 3, 2, 1, 0], [3, 3, 3, 3, 3]):
        assert torch.equal(after(numbers), together[numbers])


def test_a_cleared_cache_gives_its_memory_back(tmp_path):
    _, decoder = build(tmp_path)
    cache = decoder.new_cache()
    decoder.next_logits([Segment(cache, [1, 2, 3])])
    assert cache.store.numel() > 0
    cache.clear()
    assert cache.store.untyped_storage().nbytes() == 0 and cache.length == 0
