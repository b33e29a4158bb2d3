"""What a program asks of a GPU: bytes alive, kernels, casts, the types of its products, and waits of the host."""

import sys
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

BLOCK_BYTES = 512
"""CUDA's caching allocator rounds every tensor up to blocks of this size."""
ALLOCATIONS = ("aten.empty", "aten.new_empty", "aten.detach", "prim.device", "aten.record_stream")
"""Beginnings of operators that start no kernel though they are no views."""
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._scaled_dot_product")
"""Beginnings of operators that multiply matrices."""


@dataclass
class Meter:
    """Counts since it was made or last `restarted`; bytes by GPU."""

    alive: Counter[int] = field(default_factory=Counter)
    peak: Counter[int] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    """By operator; a registered operator counts one, whatever it starts."""
    casts: int = 0
    """Of the kernels, those that only change a type."""
    products: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Matrix products by operator and type."""
    waits: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """What made the host wait for the GPU: phase, place in the code, how."""
    phase: str = "start"
    _storages: dict[int, tuple[int, int]] = field(default_factory=dict)

    def restart(self) -> None:
        """Forget what was counted; what is alive stays so, and is the new peak."""
        self.peak = Counter(self.alive)
        self.kernels, self.products, self.waits, self.casts = Counter(), Counter(), Counter(), 0

    def restart_peak(self) -> None:
        """Let the peak begin at what is alive."""
        self.peak = Counter(self.alive)

    def see(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Count one operator that has run on a GPU."""
        for tensor in tensors_of((out,)):
            self.hold(tensor)
        name = str(func)
        if func.is_view or name.startswith(ALLOCATIONS):
            return
        self.kernels[name] += 1
        self.casts += is_cast(name, args)
        if name.startswith(PRODUCTS):
            # Attention's backward pass also takes sums that are float32 whatever it multiplies.
            factors = args[:3] if "attention" in name else args
            self.products[name, name_types(factors)] += 1

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            weakref.finalize(storage, self._let_go, storage._cdata)
            self._storages[storage._cdata] = (tensor.device.index or 0, 0)
        self.resize(storage)

    def resize(self, storage: Any) -> None:
        """Count the present size of a storage that is held."""
        if (known := self._storages.get(storage._cdata)) is None:
            return
        gpu, before = known
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        if size != before:
            self._storages[storage._cdata] = (gpu, size)
            self.alive[gpu] += size - before
            self.peak[gpu] = max(self.peak[gpu], self.alive[gpu])

    def wait(self, how: str) -> None:
        """Count a wait of the host, with the place in the package that waits."""
        self.waits[self.phase, find_place(), how] += 1

    def _let_go(self, key: int) -> None:
        gpu, size = self._storages.pop(key)
        self.alive[gpu] -= size


def is_cast(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an operator only changes a type."""
    if name.startswith("aten._to_copy"):
        return True
    return name.startswith("aten.copy_") and args[0].dtype is not args[1].dtype


def name_types(args: tuple[Any, ...]) -> str:
    """The one type of a product's numbers; several, joined, where it mixes them, which no kernel of a GPU does."""
    numbers = {tensor.dtype for tensor in tensors_of(args) if tensor.is_floating_point()}
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in numbers))


def tensors_of(values: Any) -> Any:
    """Every tensor in (nested lists of) arguments."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


def find_place() -> str:
    """The nearest function of the package that is being run: `train.trainer.accumulate`."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("cqlora."):
            return f"{module.removeprefix('cqlora.')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"
