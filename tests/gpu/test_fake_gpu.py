"""The fake GPU itself: what it counts, and what it refuses as a real one would."""

import pytest


def test_every_wait_is_counted_and_what_a_gpu_would_refuse_is_refused(fake_gpu):
    found = fake_gpu.ask("try_the_meter")
    assert found["waits"] == [
        ["_local_scalar_dense", 1],
        ["_to_copy", 1],
        ["copy from pageable memory", 1],
        ["copy_", 1],
        ["index.Tensor", 1],
        ["nonzero", 1],
        ["synchronize", 1],
    ]
    # A size that depends on numbers, a mask, two devices in one sum.
    assert found["refused"] == [True, True, True]
    # The fake kernels let this pass: tests look at the types of products themselves.
    assert found["types"] == ["bfloat16 and float32"]
    assert found["alive"] == [512, 0]


def test_what_goes_wrong_there_is_told_here(fake_gpu):
    with pytest.raises(AssertionError, match=r"(?s)Traceback.*none_such"):
        fake_gpu.ask("measure_step", "model=none_such")
