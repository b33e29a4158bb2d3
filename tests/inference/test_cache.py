"""Short sequences stand side by side, keep what they hold wherever they are moved, and leave no memory behind."""

import math

import pytest
import torch

from cqlora.inference.architecture import Architecture
from cqlora.inference.cache import KeyValueCache, Shelf

SHAPE = Architecture(
    layers=2, hidden=16, intermediate=32, heads=4, key_value_heads=2, head_dim=4, vocab_size=32, tied=True,
    epsilon=1e-6, max_length=64, rope={"rope_type": "default", "rope_theta": 10_000.0},
)  # fmt: skip


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr("cqlora.inference.cache.SHELF_LENGTH", 12)


def filled(length: int) -> tuple[KeyValueCache, torch.Tensor]:
    """A cache and what it holds."""
    cache = KeyValueCache(SHAPE, torch.empty(0))
    cache.reserve(length)
    held = torch.randn(SHAPE.layers, 2, SHAPE.key_value_heads, length, SHAPE.head_dim)
    cache.store[:, :, :, :length] = held
    cache.length = length
    return cache, held


def holds(cache: KeyValueCache, expected: torch.Tensor) -> bool:
    return torch.equal(cache.store[:, :, :, : cache.length], expected)


def test_caches_keep_what_they_hold_when_others_come_leave_and_outgrow_the_shelf():
    torch.manual_seed(0)
    (caches, held) = zip(*(filled(length) for length in (3, 7, 5, 11)), strict=True)
    shelf = Shelf(4)
    shelf.arrange(caches)
    assert shelf.caches == list(caches) and all(map(holds, caches, held))
    assert all(caches[row].store.data_ptr() == shelf.store[:, :, row].data_ptr() for row in range(4))
    shelf.leave(caches[0])
    caches[0].clear()
    assert shelf.caches == [caches[3], caches[1], caches[2]] and all(map(holds, caches[1:], held[1:]))
    caches[3].length = 12
    last = caches[3].store[:, :, :, :12].clone()
    shelf.arrange(caches[1:])
    assert shelf.caches == [caches[2], caches[1]] and all(map(holds, caches[1:], [*held[1:3], last]))
    assert caches[3].store.shape[3] > 12, "room for the next token"


def test_positions_that_a_step_multiplies_without_holding_anything_are_finite(monkeypatch):
    monkeypatch.setattr("cqlora.inference.cache._FINITE_STEP", 2)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size: self.new_full(_size(size), math.nan))
    shelf, (long, held) = Shelf(3), filled(9)
    caches = [filled(3)[0], filled(4)[0]]
    for waiting in ([], [long]):
        caches += waiting
        for _ in range(2):
            shelf.arrange(caches)
            longest = max(cache.length for cache in caches) + 1
            assert shelf.store[:, :, : len(caches), :, :longest].isfinite().all()
            for cache in caches[:2]:
                cache.length += 1
    assert holds(long, held)


def _size(size: tuple) -> tuple[int, ...]:
    return tuple(size[0]) if isinstance(size[0], tuple | torch.Size) else size


def test_one_alone_and_those_that_are_too_long_stay_where_they_are(monkeypatch):
    shelf, (short, held), (long, _) = Shelf(4), filled(3), filled(13)
    shelf.arrange([short, long])
    assert shelf.caches == [] and holds(short, held)
    monkeypatch.setattr("cqlora.inference.cache._SHELF_ROW_BYTES", 100)
    shelf.arrange([short, filled(3)[0]])
    assert shelf.caches == []


def test_the_shelf_gives_its_memory_back_when_the_last_leaves():
    shelf, caches = Shelf(2), [filled(3)[0], filled(4)[0]]
    shelf.arrange(caches)
    for cache in caches:
        shelf.leave(cache)
        shelf.leave(cache)
        cache.clear()
    assert shelf.store.numel() == 0
