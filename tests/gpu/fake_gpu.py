"""A GPU that is not there: its tensors have shape, type, device and lifetime, and no numbers; the host's are real.

What leaves the GPU for the host is zeros, and true. Shapes, types and devices are checked by torch's own fake
kernels, so a program that would mix them on a GPU fails here as it would there. Needs `guard.py`'s environment.
"""

import contextlib
import sys
import weakref
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from transformers.utils import import_utils

import cqlora.model.attention
from tests.gpu.meter import Meter, tensors_of

aten = torch.ops.aten
ASKS_FOR_NUMBERS = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.index.Tensor,
}
"""Operators whose answer or whose size the host has to wait for; `index` where it is asked with a mask."""


class FakeGpu(TorchDispatchMode):
    """Within it, operators on CUDA tensors run on none; `meter` counts them."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self.shapes = FakeTensorMode(allow_non_fake_inputs=True)
        self.on_host: Counter[str] = Counter()
        """Operators of bitsandbytes that have run on the host."""
        self._pinned: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            # A sharded tensor takes itself apart first.
            return NotImplemented
        kwargs = dict(kwargs or {})
        if not is_on_gpu(args, kwargs):
            return self._run_on_host(func, args, kwargs)
        if leaves_gpu(func, args, kwargs):
            waits = "" if not kwargs.get("non_blocking") else ", not waited for"
            self.meter.wait(func.name().removeprefix("aten::") + waits)
            return read_back(func, args, kwargs)
        if func in ASKS_FOR_NUMBERS and (func is not aten.index.Tensor or has_mask(args[1])):
            self.meter.wait(func.name().removeprefix("aten::"))
        self._note_transfer(func, args)
        if "generator" in kwargs:
            kwargs["generator"] = None
        with self.shapes:
            out = func(*tree_map(self._without_numbers, args), **tree_map(self._without_numbers, kwargs))
        self.meter.see(func, args, out)
        return out

    def _without_numbers(self, value: Any) -> Any:
        """An argument as the fake kernels take it: of host tensors their shape alone."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        # Not the mode's own conversion, which keeps a weak reference to what it converts.
        shape = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return FakeTensor(self.shapes, shape, value.device)

    def _run_on_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func.namespace == "bitsandbytes":
            self.on_host[str(func)] += 1
        if func is aten.is_pinned.default:
            return args[0].untyped_storage()._cdata in self._pinned
        if func is aten._pin_memory.default:
            return self._pin(args[0].clone())
        pinned = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        return self._pin(out) if pinned else out

    def _pin(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        self._pinned.add(key)
        weakref.finalize(tensor.untyped_storage(), self._pinned.discard, key)
        return tensor

    def _note_transfer(self, func: Any, args: Any) -> None:
        """A copy from memory that is not pinned is put aside by the host before it goes on."""
        if func not in (aten._to_copy.default, aten.copy_.default):
            return
        source = args[1] if func is aten.copy_.default else args[0]
        if not isinstance(source, FakeTensor) and source.untyped_storage()._cdata not in self._pinned:
            self.meter.wait("copy from pageable memory")


def is_on_gpu(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator has to do with a GPU."""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cuda":
        return True
    return any(isinstance(tensor, FakeTensor) for tensor in tensors_of((args, tuple(kwargs.values()))))


def leaves_gpu(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator brings numbers to the host."""
    if func is aten._local_scalar_dense.default:
        return True
    if func is aten._to_copy.default:
        return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    return func is aten.copy_.default and not isinstance(args[0], FakeTensor)


def read_back(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the host is given."""
    if func is aten._local_scalar_dense.default:
        kind = args[0].dtype
        return True if kind is torch.bool else 0.0 if kind.is_floating_point else 0
    if func is aten.copy_.default:
        return args[0]
    dtype = kwargs.get("dtype") or args[0].dtype
    return torch.full(args[0].shape, dtype is torch.bool, dtype=dtype)


def has_mask(indices: Any) -> bool:
    """Whether an index is a mask, whose true places have to be counted."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class FakeParams4bit(FakeTensor, Params4bit):  # type: ignore[misc]
    """bitsandbytes' weight, whose own class cannot hold a tensor without numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl


_new_on_host = Params4bit.__new__


def new_weight(cls: type, data: Any = None, requires_grad: bool = False, **options: Any) -> Tensor:
    """In place of `Params4bit.__new__`."""
    if not isinstance(data, FakeTensor):
        return _new_on_host(cls, data, requires_grad, **options)
    weight: Any = data.detach()
    weight.__class__ = FakeParams4bit
    weight._is_param = True
    defaults = {"quant_state": None, "compress_statistics": True, "quant_type": "fp4", "quant_storage": torch.uint8}
    for name, value in (defaults | {"module": None, "bnb_quantized": False, "blocksize": 64} | options).items():
        setattr(weight, name, value)
    return weight


def quantize_weight(weight: Any, device: torch.device | str) -> Tensor:
    """In place of `Params4bit._quantize`, which changes the weight where it is."""
    packed, state = quantize_4bit(
        weight.data.contiguous().to(device),
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    )
    if weight.module is not None:
        weight.module.quant_state = state
    kept = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")
    options = {name: getattr(weight, name) for name in kept}
    return Params4bit(packed, quant_state=state, bnb_quantized=True, **options)


class Stream:
    """A queue of work that is always empty; an event that has always passed."""

    def __init__(self, *arguments: Any, **options: Any) -> None: ...
    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None: ...
    def wait(self, *arguments: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record(self, *arguments: Any) -> None: ...
    def record_event(self, event: Any = None) -> "Stream":
        return self

    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


@dataclass(frozen=True)
class Card:
    """What the driver would tell of each GPU."""

    gpus: int = 1
    capability: tuple[int, int] = (9, 0)
    memory_gib: float = 80.0


def pretend(card: Card, meter: Meter) -> FakeGpu:
    """Let this process see GPUs like `card`; enter what is returned to compute on them."""
    # torch.tensor([…], device="cuda") makes its numbers on the host and sends them.
    torch._C._set_only_lift_cpu_tensors(True)
    Params4bit.__new__ = new_weight  # type: ignore[method-assign, assignment]
    Params4bit._quantize = quantize_weight  # type: ignore[method-assign]
    pretend_driver(card, meter)
    pretend_streams(meter)
    pretend_generators()
    pretend_storages(meter)
    pretend_attention(card)
    pretend_flash_attn()
    pretend_norm()
    pretend_modules()
    pretend_numbers()
    pretend_kernels()
    return FakeGpu(meter)


def pretend_driver(card: Card, meter: Meter) -> None:
    """Answer what is asked of torch.cuda about its devices and their memory."""
    cuda: Any = torch.cuda
    memory = int(card.memory_gib * 2**30)

    def alive(device: Any = 0) -> int:
        return meter.alive[number_of(device)]

    def peak(device: Any = 0) -> int:
        return meter.peak[number_of(device)]

    answers = {
        "is_available": True, "is_initialized": True, "device_count": card.gpus, "current_device": 0,
        "set_device": None, "init": None, "_lazy_init": None, "empty_cache": None, "is_bf16_supported": True,
        "get_device_capability": card.capability, "get_device_name": "a GPU that is not there",
        "get_device_properties": SimpleNamespace(
            name="a GPU that is not there", total_memory=memory, major=card.capability[0], minor=card.capability[1],
            multi_processor_count=132,
        ),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.memory_allocated = cuda.memory_reserved = alive
    cuda.max_memory_allocated = cuda.max_memory_reserved = peak
    cuda.mem_get_info = lambda device=0: (memory - alive(device), memory)
    cuda.reset_peak_memory_stats = lambda device=0: meter.restart_peak()


def number_of(device: Any) -> int:
    """A GPU's number, however it is named."""
    return device if isinstance(device, int) else torch.device(device or 0).index or 0


def pretend_streams(meter: Meter) -> None:
    """Queues and events that order nothing, since nothing runs; waiting for all of a GPU's work is counted."""
    cuda: Any = torch.cuda
    only = Stream()
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: only
    cuda.stream = cuda.device = lambda _: contextlib.nullcontext()
    cuda.set_stream = lambda stream: None
    cuda.synchronize = lambda device=None: meter.wait("synchronize")
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]


def pretend_generators() -> None:
    """Random numbers on a GPU are none; a generator's state is kept on the host."""
    cuda: Any = torch.cuda
    states: dict[int, Tensor] = {}
    on_host = torch.Generator
    torch.Generator = lambda device="cpu": on_host()  # type: ignore[misc, assignment]
    cuda.manual_seed = cuda.manual_seed_all = cuda.seed_all = lambda *_: None
    cuda.get_rng_state = lambda device=0: states.get(number_of(device), torch.zeros(16, dtype=torch.uint8))
    cuda.set_rng_state = lambda state, device=0: states.update({number_of(device): state})


def pretend_storages(meter: Meter) -> None:
    """FSDP frees and fills storages in place; files are written of what is on the host."""
    resize, save = torch.UntypedStorage.resize_, torch.save

    def resize_and_count(storage: Any, size: int) -> Any:
        resize(storage, size)
        meter.resize(storage)
        return storage

    def save_from_host(values: Any, *arguments: Any, **options: Any) -> None:
        save(tree_map_only(FakeTensor, lambda tensor: tensor.cpu(), values), *arguments, **options)

    torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign]
    torch.save = save_from_host


_LIBRARY = torch.library.Library("fake_gpu", "DEF")
_LIBRARY.define("rms_norm(Tensor x, Tensor weight) -> (Tensor, Tensor)")
_LIBRARY.define("rms_norm_backward(Tensor grad, Tensor x, Tensor roots, Tensor weight) -> Tensor")
torch.library.register_fake(
    "fake_gpu::rms_norm",
    lambda x, weight: (torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "fake_gpu::rms_norm_backward", lambda grad, x, roots, weight: torch.empty_like(x), lib=_LIBRARY
)


class RmsNorm(torch.autograd.Function):
    """torch's kernels for RMSNorm with a frozen weight: its input is kept, and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        output, roots = torch.ops.fake_gpu.rms_norm(x, weight)
        ctx.save_for_backward(x, roots, weight)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, roots, weight = ctx.saved_tensors
        return torch.ops.fake_gpu.rms_norm_backward(grad, x, roots, weight), None


def pretend_norm() -> None:
    """RMSNorm by the kernels that torch has on a GPU; a build without CUDA takes it apart."""
    on_host = F.rms_norm

    def normalise(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        on_gpu = isinstance(x, FakeTensor) and weight is not None and not weight.requires_grad
        return RmsNorm.apply(x, weight) if on_gpu else on_host(x, shape, weight, eps)

    F.rms_norm = normalise  # type: ignore[assignment]


def pretend_attention(card: Card) -> None:
    """Attention by the kernel that torch would choose on such a card; a build without CUDA knows none of them."""
    flash, efficient = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: Any = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        sixteen_bits = query.dtype in (torch.bfloat16, torch.float16)
        if not isinstance(query, FakeTensor) or attn_mask is not None:
            return on_host(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if sixteen_bits and card.capability >= (8, 0):
            return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        assert not enable_gqa, "torch has no kernel but the plain formula for grouped queries on such a card"
        return efficient(query, key, value, None, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]

    on_host = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]


def pretend_flash_attn() -> None:
    """The package flash-attn, by torch's copy of its kernel."""

    def attend(*arguments: Any, dropout_p: float, softmax_scale: Any, causal: bool, window_size: Any) -> Tensor:
        query, key = arguments[:2]
        assert causal and not dropout_p and window_size == (-1, -1)
        options = {"scale": softmax_scale, "window_size": (-1, 0), "enable_gqa": query.shape[1] != key.shape[1]}
        output: Tensor = varlen.varlen_attn(*arguments, **options)
        return output

    sys.modules["flash_attn"] = SimpleNamespace(flash_attn_varlen_func=attend)  # type: ignore[assignment]
    cqlora.model.attention.is_flash_attn_2_available = lambda: True


def pretend_modules() -> None:
    """A module's parameters change in place as real ones do; torch swaps those without numbers, which is refused."""
    apply = nn.Module._apply

    def apply_in_place(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
        if not any(isinstance(parameter, FakeTensor) for parameter in module._parameters.values()):
            return apply(module, change, recurse)
        for child in module.children() if recurse else ():
            child._apply(change)
        with torch.no_grad():
            for parameter in [each for each in module._parameters.values() if each is not None]:
                parameter.data = change(parameter)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else change(buffer)
        return module

    nn.Module._apply = apply_in_place  # type: ignore[method-assign]


def pretend_numbers() -> None:
    """transformers looks for nothing in the numbers of what it takes for a traced tensor, and on a GPU it would."""
    import_utils.is_fake_tensor = lambda tensor: False


def pretend_kernels() -> None:
    """Let operators that have a kernel of their own on each device be one operator, which they are on a GPU.

    A build without CUDA has no other kernel for a GPU than the formula of several operators.
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and has(name, "CPU") and has(name, "CompositeImplicitAutograd"):
            OPERATORS.impl(name.removeprefix("aten::"), refuse_numbers, "CUDA")


def refuse_numbers(*arguments: Any, **options: Any) -> Any:
    """A kernel on a GPU that is not there."""
    raise AssertionError("there is no GPU: the fake kernels come first")


OPERATORS = torch.library.Library("aten", "IMPL")
