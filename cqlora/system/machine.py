"""What this machine has, asked of its driver and its system without torch; nothing is decided here."""

import ctypes
import os
import re
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import which

from cqlora.system.processor import suits_bfloat16

BFLOAT16_CAPABILITY = (8, 0)
"""GPUs from Ampere on multiply bfloat16, and flash attention's kernels need them."""
FLOAT16_CAPABILITY = (7, 0)
"""GPUs from Volta on have matrix units for float16."""
_CAPABILITY_ATTRIBUTES = (75, 76)
"""cuda.h's numbers of the two parts of a compute capability."""
_OLDEST_FLASH = (2, 3, 3)
"""transformers takes no older flash-attn."""
_OLDEST_VARLEN = (2, 13)
"""Older torches have no `torch.nn.attention.varlen`, or one without causal windows and grouped queries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One NVIDIA GPU; what the driver does not tell is 0."""

    memory_gib: float
    capability: tuple[int, int]
    """CUDA's compute capability: (8, 0) of an A100."""
    free_gib: float = 0.0
    """What no program holds at this moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One machine, probed or described."""

    gpus: tuple[Gpu, ...] = ()
    """Those that a process may use, in CUDA's order."""
    one_gpu_each: bool = False
    """Each worker is shown the one GPU that is its own, as srun may do."""
    memory_gib: float = 0.0
    """Of the host; 0 is not known."""
    bfloat16_units: bool = False
    """The processor multiplies bfloat16."""
    flash_attention: bool = False
    """The package flash-attn is installed."""
    varlen_attention: bool = False
    """torch has flash attention over documents of differing lengths."""
    triton: bool = False
    """The package triton is installed, as it is with torch's builds for CUDA."""


def probe_machine(look_for_gpus: bool = True) -> Machine:
    """This machine; asking for its GPUs takes a program that need not be started where none is used."""
    return Machine(
        gpus=list_gpus() if look_for_gpus else (),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        bfloat16_units=suits_bfloat16(),
        flash_attention=_is_installed("flash-attn", _OLDEST_FLASH),
        varlen_attention=has_varlen_attention(),
        triton=_is_installed("triton"),
    )


def cache_folder(kind: str) -> Path:
    """Where this user's caches of a kind lie, whether or not they are there (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cqlora" / kind


def list_gpus() -> tuple[Gpu, ...]:
    """Each NVIDIA GPU that this process may use, in CUDA's order, asked of the driver and not of torch."""
    if which("nvidia-smi") is None:
        return ask_cuda()
    # Drivers that do not know compute_cap are too old for the torch that trains here.
    asked = "uuid,memory.total,compute_cap,memory.free,mig.mode.current"
    query = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return ()
    rows = [[cell.strip() for cell in row.split(",")] for row in answer.stdout.splitlines() if row.strip()]
    found = {
        uuid: Gpu(memory_gib=_number(memory) / 1024, capability=_pair(cap), free_gib=_number(free) / 1024)
        for uuid, memory, cap, free, _ in rows
    }
    whole = [(uuid, found[uuid]) for uuid, *_, divided in rows if divided != "Enabled"]
    if not whole or "MIG-" in os.environ.get("CUDA_VISIBLE_DEVICES", ""):
        # CUDA shows a process one part, however many there are.
        return _choose_visible(list_parts(found))[:1]
    if os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        # CUDA's own order is by speed, the driver's by slot.
        whole.sort(key=lambda each: each[1].capability, reverse=True)
    return _choose_visible(whole)


def list_parts(whole: dict[str, Gpu]) -> list[tuple[str, Gpu]]:
    """Parts of GPUs that have been divided (MIG), by UUID, then the first part of each under the GPU's own.

    A part's profile tells its memory, as `3g.40gb` does.
    """
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    parts: list[tuple[str, Gpu]] = []
    first: dict[str, Gpu] = {}
    parent = ""
    for line in answer.stdout.splitlines():
        uuid = re.search(r"\(UUID: ([^)]+)\)", line)
        # A part of a part has two numbers: `1c.3g.40gb`.
        profile = re.match(r"\s*MIG (?:\d+c\.)?\d+g\.(\d+)gb", line)
        if uuid and profile and parent in whole:
            parts.append((uuid[1], Gpu(memory_gib=float(profile[1]), capability=whole[parent].capability)))
            first.setdefault(parent, parts[-1][1])
        elif uuid and not profile:
            parent = uuid[1]
    return [*parts, *first.items()]


def ask_cuda() -> tuple[Gpu, ...]:
    """Each GPU that CUDA itself counts: for containers that are given GPUs to compute alone, without nvidia-smi."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_ask_cuda_of(cuda, number) for number in range(count.value))


def _ask_cuda_of(cuda: ctypes.CDLL, number: int) -> Gpu:
    """One GPU, in cuda.h's words."""
    memory, gpu, capability = ctypes.c_size_t(), ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    cuda.cuDeviceGet(ctypes.byref(gpu), number)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), gpu)
    for value, attribute in zip(capability, _CAPABILITY_ATTRIBUTES, strict=True):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, gpu)
    return Gpu(memory_gib=memory.value / 2**30, capability=(capability[0].value, capability[1].value))


def _choose_visible(found: list[tuple[str, Gpu]]) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES names, in its order, by number or by the beginning of a UUID; else all.

    As in CUDA a name that is nobody's hides itself and all that follow.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(gpu for _, gpu in found)
    chosen = []
    for name in map(str.strip, visible.split(",")):
        named = [
            gpu for number, (uuid, gpu) in enumerate(found) if name and (name == str(number) or uuid.startswith(name))
        ]
        if not named:
            break
        chosen.append(named[0])
    return tuple(chosen)


def read_driver_version() -> str:
    """The NVIDIA driver's version; empty where there is none to ask."""
    if which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.split("\n")[0].strip() if answer.returncode == 0 else ""


def _number(cell: str) -> float:
    return float(cell) if re.fullmatch(r"\d+(\.\d+)?", cell) else 0.0


def _pair(cell: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)\.(\d+)", cell)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def has_varlen_attention() -> bool:
    """Whether torch has flash attention over documents of differing lengths, for such GPUs as run it."""
    return _is_installed("torch", _OLDEST_VARLEN)


def _is_installed(package: str, oldest: tuple[int, ...] = ()) -> bool:
    """Whether a package is here, in a version from `oldest` on."""
    try:
        numbers = re.findall(r"\d+", version(package))
    except PackageNotFoundError:
        return False
    return tuple(int(number) for number in numbers[:3]) >= oldest


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
