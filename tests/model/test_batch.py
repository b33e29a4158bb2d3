"""A micro batch: what the host works out of packs, and that a device is not waited for until the step ends."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cqlora.data.cache import prepare_cache
from cqlora.model.adapters import attach_adapter
from cqlora.model.batch import build_batch
from cqlora.model.fused import fuse_blocks
from cqlora.model.load import load_base
from cqlora.model.noise import EmbeddingNoise
from cqlora.model.objective import Objective
from cqlora.random_base import open_base
from tests.runs import typed_run

CPU = torch.device("cpu")
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::item", "aten::masked_select"}
"""Operators whose result, or its size, the host must have before it goes on."""


def pack(lengths: list[int], sources: list[int], first: int) -> SimpleNamespace:
    tokens = np.arange(first, first + sum(lengths), dtype=np.int64)
    return SimpleNamespace(
        token_ids=tokens, label_mask=tokens % 3 > 0, document_lengths=lengths, source_ids=sources, characters=lengths
    )


def test_the_predicted_tokens_their_places_and_sources_are_those_of_a_plain_loop():
    packs = [pack([4, 1, 5], [0, 2, 1], 10), pack([6], [2], 100)]
    batch = build_batch(packs, CPU)
    expected, place = [], 0
    for each in packs:
        at = 0
        for length, source in zip(each.document_lengths, each.source_ids, strict=True):
            for offset in range(length):
                if offset and each.label_mask[at + offset]:
                    expected.append((place + offset, int(each.token_ids[at + offset]), source))
            at, place = at + length, place + length
    found = zip(batch.label_positions.tolist(), batch.targets.tolist(), batch.label_sources.tolist(), strict=True)
    assert list(found) == expected and len(expected) > 5
    assert batch.position_ids[0].tolist() == [*range(4), 0, *range(5), *range(6)]


class Waits(TorchDispatchMode):
    """Counts the operators that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITS:
            self.found.append(func._schema.name)

        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("embeddings", ["frozen", "lora", "full"])
def test_nothing_in_a_micro_batch_waits_for_the_device(embeddings, workspace):
    config = typed_run(workspace, "stage=pretrain", f"stage.embeddings={embeddings}")
    base = open_base(config.model)
    packs = [prepare_cache(config, base).splits["train"].pack(number) for number in range(2)]
    model = load_base(base, config.model, config.hardware, CPU, torch.float32)
    model = attach_adapter(model, base, config.lora, config.stage.embeddings, "")
    objective = Objective(model, torch.float32, autocast=not fuse_blocks(model)).train()
    with Waits() as waits:
        loss, losses = objective(build_batch(packs, CPU), 7.0, EmbeddingNoise(5.0, (1, 0, 0, 0)))
        loss.backward()
        before = list(waits.found)
        losses.nonzero()
    assert before == [] and waits.found == ["aten::nonzero"]
    assert len(losses) > 100 and any(parameter.grad is not None for parameter in objective.parameters())
