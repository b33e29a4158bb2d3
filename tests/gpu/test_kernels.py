"""How many kernels a micro batch of 7B in a pack of 2,048 tokens asks of a GPU: `python -m tests.gpu.count_kernels`."""

import pytest

MOST_KERNELS = 4_100
MOST_CASTS = 300


def test_a_micro_batch_of_7b_asks_for_no_more_kernels_and_casts_than_it_may(fake_gpu):
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    found = fake_gpu.ask("count_kernels")
    assert found["forward"] < found["total"] <= MOST_KERNELS
    assert found["casts"] <= MOST_CASTS
    assert sum(found["operators"].values()) == found["total"] and min(found["operators"].values()) > 0


def test_without_triton_adapters_are_cast_once_all_the_same(fake_gpu):
    found = fake_gpu.ask("count_kernels", "hardware.kernels=plain")
    assert found["total"] > MOST_KERNELS and found["casts"] <= MOST_CASTS
