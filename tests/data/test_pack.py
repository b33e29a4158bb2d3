"""Packing: nothing lost, nothing over the sequence_length, little room left."""

from itertools import pairwise

import numpy as np
import pytest

from cqlora.data.pack import best_fit_decreasing, pack_documents


def packs_of(lengths: np.ndarray, sequence_length: int) -> list[list[int]]:
    packing = pack_documents(lengths, sequence_length)
    bounds = packing.offsets.astype(int)
    return [packing.documents[a:b].tolist() for a, b in pairwise(bounds)]


@pytest.mark.parametrize("seed", range(5))
def test_every_document_stands_in_one_pack_and_none_is_overfull(seed: int):
    lengths = np.random.default_rng(seed).integers(1, 513, 2000).astype(np.uint32)
    packs = packs_of(lengths, 512)
    assert sorted(document for pack in packs for document in pack) == list(range(2000))
    assert all(lengths[pack].sum() <= 512 for pack in packs)


def textbook_best_fit(lengths: list[int], sequence_length: int) -> int:
    """Packs that the textbook's quadratic algorithm needs."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(sequence_length - length)
    return len(rooms)


@pytest.mark.parametrize("seed", range(5))
def test_it_needs_no_more_packs_than_textbook_best_fit(seed: int):
    lengths = np.random.default_rng(seed).integers(1, 200, 400).astype(np.uint32)
    expected = textbook_best_fit(lengths.tolist(), 256)
    assert best_fit_decreasing(lengths.astype(np.int64), 256).max() + 1 == expected
    assert len(packs_of(lengths, 256)) <= expected


def test_documents_of_much_the_same_length_are_repacked_by_sums():
    """Best-fit decreasing puts three long ones together and leaves a fifth of each pack empty."""
    lengths = np.random.default_rng(3).normal(480, 120, 300).clip(50, 900).astype(np.uint32)
    packs = packs_of(lengths, 2048)
    assert len(packs) < textbook_best_fit(lengths.tolist(), 2048)
    filled = sorted(int(lengths[pack].sum()) for pack in packs)
    assert sum(filled[1:]) / (2048 * (len(packs) - 1)) > 0.98


def test_lengths_like_those_of_articles_fill_over_98_percent():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 20_000).clip(2, 2048).astype(np.uint32)
    packs = packs_of(lengths, 2048)
    assert lengths[np.concatenate(packs[:-1])].sum() / (2048 * (len(packs) - 1)) > 0.98


def test_no_documents_make_no_packs():
    assert packs_of(np.zeros(0, dtype=np.uint32), 16) == []


def test_equal_lengths_keep_their_order():
    assert packs_of(np.full(4, 5, dtype=np.uint32), 10) == [[0, 1], [2, 3]]
