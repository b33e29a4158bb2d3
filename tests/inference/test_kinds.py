"""Every kind of model that the engine runs gives transformers' logits and replies, and its snapshot is the model."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cqlora.base import read_base
from cqlora.engine import LlamaEngine
from cqlora.errors import ModelError
from cqlora.inference.architecture import read_architecture
from cqlora.inference.decoder import Decoder, Segment
from cqlora.inference.opening import Request, open_decoder
from tests.inference.conftest import build_adapter, peft_model
from tests.inference.test_snapshot import files
from tests.kinds import OPTIONS, SHAPE, VARIANTS, write_kind

CPU = torch.device("cpu")
PROMPTS, NEW_TOKENS = 20, 24
NEAR = 1e-3
"""Two logits that are closer may change places by rounding; the scores of these models have a deviation above 1."""


def stock_logits(model, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def decoder_of(folder: Path, adapter: Path | None = None, dtype: str = "float32", cache: bool = False) -> Decoder:
    request = Request(adapter or folder, folder if adapter else None, "auto", dtype, cache=cache, device=CPU)
    return open_decoder(request)[0]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [torch.randint(4, SHAPE["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("kind, options", VARIANTS, ids=str)
def test_logits_in_one_pass_and_token_by_token_are_those_of_transformers(kind, options, tmp_path):
    folder = write_kind(kind, tmp_path / "base", **options)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoder, ids = decoder_of(folder), prompts(1, seed=5)[0] * 4
    expected = stock_logits(stock, ids)
    scale = float(expected.std())
    torch.testing.assert_close(decoder.all_logits(ids), expected, atol=2e-5 * scale, rtol=1e-4)
    cache = decoder.new_cache()
    for first, last in ((0, 30), *((n, n + 1) for n in range(30, len(ids)))):
        found = decoder.next_logits([Segment(cache, ids[first:last])])[0]
        torch.testing.assert_close(found, expected[last - 1], atol=2e-5 * scale, rtol=1e-4)


def choose_greedily(decoder: Decoder, waiting: list[list[int]]) -> list[list[int]]:
    """New tokens of each prompt, all prompts in one batch."""
    caches, replies = [decoder.new_cache() for _ in waiting], [[] for _ in waiting]
    for _ in range(NEW_TOKENS):
        logits = decoder.next_logits([Segment(cache, ids) for cache, ids in zip(caches, waiting, strict=True)])
        waiting = [[int(row.argmax())] for row in logits]
        for reply, ids in zip(replies, waiting, strict=True):
            reply += ids
    return replies


def differs_by_a_near_tie(stock, prompt: list[int], ours: list[int], theirs: list[int]) -> bool:
    """Whether two replies part where transformers itself all but chose the other token."""
    place = next(n for n, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
    logits = stock_logits(stock, prompt + theirs[:place])[-1]
    return bool(logits.max() - logits[ours[place]] < NEAR)


@pytest.mark.parametrize("kind", OPTIONS)
def test_twenty_greedy_replies_are_those_of_transformers_in_float32(kind, tmp_path):
    folder = write_kind(kind, tmp_path / "base")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = prompts(PROMPTS)
    ours = choose_greedily(decoder_of(folder), asked)
    near_ties = 0
    for prompt, reply in zip(asked, ours, strict=True):
        generated = stock.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            eos_token_id=-1, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        if reply != generated:
            assert differs_by_a_near_tie(stock, prompt, reply, generated)
            near_ties += 1
    assert near_ties <= 2


@pytest.mark.parametrize("kind, options", VARIANTS, ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_on_nf4_is_that_of_peft_and_a_snapshot_keeps_it(kind, options, dora, tmp_path):
    folder = write_kind(kind, tmp_path / "base", hidden_size=128, intermediate_size=192, **options)
    adapter = build_adapter(folder, tmp_path / "adapter", quantized=True, use_dora=dora)
    ids = prompts(1, seed=3)[0]
    expected = stock_logits(peft_model(folder, adapter, quantized=True), ids)
    scale = float(expected.std())
    first = decoder_of(folder, adapter, cache=True).all_logits(ids)
    torch.testing.assert_close(first, expected, atol=1e-4 * scale, rtol=1e-3)
    assert len(files(tmp_path)) == 1
    assert torch.equal(decoder_of(folder, adapter, cache=True).all_logits(ids), first)
    # The form that is fastest here, whose products are of bfloat16 numbers wherever the processor has them.
    fast = [decoder_of(folder, adapter, "auto", cache=True).all_logits(ids) for _ in range(2)]
    assert torch.equal(*fast) and float((fast[0] - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("kind", ["qwen3", "smollm3"])
def test_the_engine_opens_a_folder_and_answers(kind, tmp_path):
    folder = write_kind(kind, tmp_path / "base")
    engine = LlamaEngine(folder, "", use_lora=False, dtype="float32")
    chats = [[{"role": "user", "text": text}] for text in ("长江", "the longest river", "a")]
    together = engine.generate_batch(chats, temperature=0, max_new_tokens=12, ignore_end=True)
    assert together == [engine.generate(chat, temperature=0, max_new_tokens=12, ignore_end=True) for chat in chats]


def test_what_the_engine_does_not_compute_is_refused_with_what_does(tmp_path):
    folder = write_kind("qwen3", tmp_path / "base", hidden_act="gelu")
    with pytest.raises(ModelError, match=r"hidden_act=gelu, and the engine runs silu only; .*transformers or vLLM"):
        read_architecture(read_base(folder).config, folder)
