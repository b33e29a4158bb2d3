"""What can be read of this machine without torch: memory, processor, how fast it multiplies matrices."""

import os
import time
from functools import cache

from cqlora.preflight import list_gpus


@cache
def gpus_here() -> tuple[float, ...]:
    """Memory in GiB of each GPU of this machine, asked of the driver once."""
    return tuple(list_gpus())


@cache
def host_memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@cache
def measure_host_tflops(seconds: float = 0.1) -> float:
    """Dense float32 matrix throughput of this machine, the best of repeated products."""
    import numpy as np

    size = 768
    left = np.ones((size, size), dtype=np.float32)
    best, deadline = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        left @ left
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best / 1e12
