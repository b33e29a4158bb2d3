"""The in-context probe asks what it says it asks, of any vocabulary."""

import numpy as np
import pytest
import torch

from cqlora.evaluation.probe import (
    EXAMPLES,
    ROUNDS,
    describe,
    encode,
    list_patterns,
    list_sequences,
    pair_places,
    probe,
)
from tests.inference.conftest import load_stock

PATTERNS = {f"{pattern.name} {pattern.language}": pattern for pattern in list_patterns()}


def test_the_material_is_large_enough_and_each_pattern_is_there_in_both_languages():
    assert len(PATTERNS) == 6
    for pattern in PATTERNS.values():
        assert len(pattern.examples) >= EXAMPLES * ROUNDS
        assert len({example.context for example in pattern.examples}) == len(pattern.examples)
        assert all(example.answer.endswith("\n") and example.answer.strip() for example in pattern.examples)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_example_of_a_round_stands_at_every_place_once(pattern):
    sequences = list(list_sequences(pattern, seed=1))
    assert len(sequences) == EXAMPLES * ROUNDS
    for first in range(0, len(sequences), EXAMPLES):
        together = sequences[first : first + EXAMPLES]
        contexts = {example.context for example in together[0]}
        assert len(contexts) == EXAMPLES
        for place in range(EXAMPLES):
            assert {sequence[place].context for sequence in together} == contexts


def test_a_seed_gives_the_same_sequences_and_another_gives_others():
    pattern = PATTERNS["translation zh"]
    assert list(list_sequences(pattern, 1)) == list(list_sequences(pattern, 1))
    assert list(list_sequences(pattern, 1)) != list(list_sequences(pattern, 2))


def test_answers_are_the_tokens_that_spell_them(engine):
    examples = PATTERNS["translation zh"].examples[:3]
    ids, spans = encode(engine, examples)
    tokenizer = engine._tokenizer.text
    told = [tokenizer.decode(ids[start:end]) for start, end in spans]
    assert told == [example.answer for example in examples]
    assert tokenizer.decode(ids) == "".join(example.context + example.answer for example in examples)


def test_losses_are_those_of_transformers_per_character(base, engine):
    pattern = PATTERNS["copying zh"]
    found = probe(engine, pattern, seed=1, batch_tokens=500)
    model, losses = load_stock(base), []
    for examples in list_sequences(pattern, 1):
        ids, spans = encode(engine, examples)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0].double()
        nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        losses.append(
            [float(nats[a - 1 : b - 1].sum()) / len(e.answer) for (a, b), e in zip(spans, examples, strict=True)]
        )
    assert found["losses"] == pytest.approx(np.mean(losses, axis=0).tolist(), rel=1e-5)
    assert (found["first_loss"], found["last_loss"]) == (found["losses"][0], found["losses"][-1])
    assert found["gain"] == pytest.approx(found["first_loss"] - found["last_loss"], rel=1e-9)


def test_gains_are_paired_over_the_same_example():
    """Where an example's cost is its own and each place is a tenth cheaper, every gain is seven tenths, surely."""
    costs = np.arange(EXAMPLES, dtype=float)
    turned = [np.roll(costs, -turn) - 0.1 * np.arange(EXAMPLES) for turn in range(EXAMPLES)]
    losses = np.array(turned * ROUNDS)
    assert pair_places(losses) == pytest.approx(0.7)
    told = describe(PATTERNS["copying en"], losses)
    assert told["gain"] == pytest.approx(0.7) and told["gain_error"] == pytest.approx(0.0, abs=1e-12)
