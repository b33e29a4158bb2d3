"""Sampling leaves the tokens that transformers leaves, with their probabilities, and draws with its own numbers."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cqlora.errors import ConfigError
from cqlora.inference.choice import TokenChooser
from cqlora.inference.requests import Sampling

torch.manual_seed(0)
SHARP, FLAT = torch.randn(600) * 4, torch.randn(600) * 0.1


def drawn(sampling: Sampling, logits: torch.Tensor, times: int, prompt=(1,)) -> list[int]:
    chooser = TokenChooser(sampling, list(prompt), len(logits))
    return [chooser.choose(logits) for _ in range(times)]


@pytest.mark.parametrize("logits", [SHARP, FLAT], ids=["sharp", "flat"])
@pytest.mark.parametrize("top_k, top_p", [(0, 0.9), (20, 1.0), (300, 0.8), (5, 0.5), (0, 1.0)])
def test_the_tokens_that_may_be_drawn_are_those_of_transformers(logits, top_k, top_p):
    sampling = Sampling(temperature=0.8, top_k=top_k, top_p=top_p, seed=1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    warpers.append(TopPLogitsWarper(top_p))
    expected = torch.softmax(warpers(torch.tensor([[1]]), logits[None])[0], dim=-1)
    chooser = TokenChooser(sampling, [1], len(logits))
    kept, tokens = chooser._candidates(torch.softmax(logits / 0.8, dim=-1))
    found = torch.zeros(600).index_copy(0, tokens, kept / kept.sum())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    counts = torch.bincount(torch.tensor(drawn(Sampling(temperature=1.0, top_p=1.0, seed=4), logits, 4000)))
    torch.testing.assert_close(counts / 4000, torch.softmax(logits, 0), atol=0.03, rtol=0)


def test_temperature_zero_is_greedy_and_seeds_repeat():
    assert drawn(Sampling(temperature=0), SHARP, 3) == [int(SHARP.argmax())] * 3
    one, other = (drawn(Sampling(temperature=1.5, seed=7), FLAT, 20) for _ in range(2))
    assert one == other != drawn(Sampling(temperature=1.5, seed=8), FLAT, 20)
    assert drawn(Sampling(temperature=1.5), FLAT, 20) != drawn(Sampling(temperature=1.5), FLAT, 20)


def test_the_repetition_penalty_is_that_of_transformers_and_counts_what_was_chosen():
    sampling = Sampling(temperature=0, repetition_penalty=1.3)
    prompt, chooser = [3, 5], TokenChooser(Sampling(temperature=0, repetition_penalty=1.3), [3, 5], 600)
    for _ in range(5):
        expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt]), SHARP[None])[0].argmax()
        prompt.append(chooser.choose(SHARP))
        assert prompt[-1] == int(expected)
    assert len(set(prompt)) > 3 and sampling.repetition_penalty == 1.3


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}, {"stop": ("",)},
     {"stop": "ab"}, {"repetition_penalty": 0.0}, {"seed": 1 << 64}, {"temperature": float("nan")}],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_sampled_with_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)
