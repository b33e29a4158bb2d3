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

from cqlora.errors import ConfigError, ModelError
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


def allowed(logits: torch.Tensor, sampling: Sampling, seen: list[int]) -> set[int]:
    """Tokens that may be drawn, in float64 and by sorting, whichever of equally likely ones stands first."""
    logits = logits.double()
    if sampling.repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        mask = torch.zeros(len(logits), dtype=torch.bool)
        mask[seen] = True
        logits = torch.where(mask, penalised, logits)
    probabilities = torch.softmax((logits - logits.max()) / sampling.temperature, 0)
    ordered = probabilities.sort(descending=True).values
    kept = (ordered.cumsum(0) - ordered < sampling.top_p).nonzero()[:, 0]
    least = ordered[kept[-1]] if len(kept) else ordered[0]
    return set(((probabilities >= least * (1 - 1e-6)) & (probabilities > 0)).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-38, 1e-6, 0.7, 2.0, 1e6, 1e38, 1e300])
@pytest.mark.parametrize("top_p", [5e-324, 1e-300, 1e-12, 0.5, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1e-300, 1e-20, 1.3, 1e20, 1e300])
def test_extreme_values_draw_what_float64_gives_a_chance(temperature, top_p, penalty):
    sampling = Sampling(temperature=temperature, top_p=top_p, repetition_penalty=penalty, seed=3)
    logits, seen = SHARP.clone(), [5, 9]
    logits[5], logits[9] = 3.0, -2.0
    expected = allowed(logits, sampling, seen)
    chooser = TokenChooser(sampling, seen, len(logits))
    found = []
    for _ in range(40):
        found.append(chooser.choose(logits))
        if penalty != 1.0:
            chooser._seen[found[-1]] = found[-1] in seen
    assert set(found) <= expected, "a token that float64 never draws"
    if len(expected) > 100 and temperature > 1 and top_p > 0.1:
        assert len(set(found)) > 10, "the same tokens over and over"


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_choose_nothing(strange, temperature):
    logits = torch.full((10,), strange)
    with pytest.raises(ModelError, match="not finite"):
        drawn(Sampling(temperature=temperature), logits, 1)
