"""NEFTune's noise against the paper's algorithm, document by document."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cqlora.data.cache import prepare_cache
from cqlora.model.batch import build_batch, count_labels
from cqlora.model.load import load_base
from cqlora.model.noise import EmbeddingNoise
from cqlora.model.objective import Objective
from cqlora.random_base import open_base
from tests.runs import typed_run

LENGTHS, WIDTH = [3, 40, 400], 32


def noise_of(seed=(1, 2, 3, 4), alpha=5.0):
    zeros = torch.zeros(1, sum(LENGTHS), WIDTH)
    return EmbeddingNoise(alpha, seed).add_to(zeros, LENGTHS)[0]


def test_each_document_has_the_noise_that_it_would_have_alone():
    """Uniform in ±alpha/√(Ld) over L·d numbers: a mean square of alpha²/3 a document, whatever its length."""
    for part, length in zip(noise_of().split(LENGTHS), LENGTHS, strict=True):
        bound = 5.0 / (length * WIDTH) ** 0.5
        assert float(part.abs().max()) <= bound
        assert float(part.abs().max()) > 0.9 * bound and abs(float(part.mean())) < 0.2 * bound
        assert float(part.norm()) == pytest.approx(5.0 / 3**0.5, rel=0.15)


def test_it_is_a_function_of_seed_step_rank_and_micro_batch():
    assert torch.equal(noise_of(), noise_of())
    for place in range(4):
        other = [1, 2, 3, 4]
        other[place] += 1
        assert not torch.equal(noise_of(), noise_of(tuple(other)))


def test_it_draws_nothing_from_the_generators_that_dropout_uses():
    before = torch.get_rng_state()
    noise_of()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_objective_with_noise_is_the_stock_model_on_embeddings_with_that_noise(workspace):
    config = typed_run(workspace, "stage=pretrain", "model.quantization=none")
    base = open_base(config.model)
    cache = prepare_cache(config, base)
    packs = [cache.splits["train"].pack(number) for number in range(2)]
    batch = build_batch(packs, torch.device("cpu"))
    noise = EmbeddingNoise(8.0, (1, 0, 0, 0))
    model = load_base(base, config.model, config.hardware, torch.device("cpu"), torch.float32)
    objective = Objective(model, torch.float32, autocast=False)
    with torch.no_grad():
        found = float(objective(batch, 1.0, noise)[0])
        plain = float(objective(batch, 1.0)[0])

    stock = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    embeddings = noise.add_to(stock.get_input_embeddings()(batch.input_ids), batch.document_lengths)
    nats = 0.0
    ends = np.cumsum(batch.document_lengths)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        with torch.no_grad():
            logits = stock(inputs_embeds=embeddings[:, start:end]).logits[0, :-1]
        labels = batch.input_ids[0, start + 1 : end]
        nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    assert found == pytest.approx(nats, rel=1e-5)
    assert abs(found - plain) > 1e-5 * plain and count_labels(packs) > 0
