"""How many kernels a micro batch of 7B in a pack of 2,048 tokens asks of a GPU: `python -m tests.gpu.count_kernels`."""

MOST_KERNELS = 7_950
MOST_CASTS = 1_600


def test_a_micro_batch_of_7b_asks_for_no_more_kernels_and_casts_than_it_did(fake_gpu):
    found = fake_gpu.ask("count_kernels")
    assert found["forward"] < found["total"] <= MOST_KERNELS
    assert found["casts"] <= MOST_CASTS
    assert sum(found["operators"].values()) == found["total"] and min(found["operators"].values()) > 0
