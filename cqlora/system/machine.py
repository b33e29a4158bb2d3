"""What can be read of this machine without torch: memory, processor, how fast it multiplies matrices."""

import os
import subprocess
import time
from functools import cache
from shutil import which


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


def list_gpus() -> list[float]:
    """Memory in GiB of each NVIDIA GPU that this process may use, asked of the driver and not of torch."""
    if which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return []
    rows = [[cell.strip() for cell in row.split(",")] for row in answer.stdout.splitlines() if row.strip()]
    return [float(memory) / 1024 for index, uuid, memory in rows if _is_visible(index, uuid)]


def _is_visible(index: str, uuid: str) -> bool:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is None or any(name and (name == index or uuid.startswith(name)) for name in visible.split(","))
