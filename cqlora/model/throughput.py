"""How fast the device multiplies matrices, and how many such operations a token of a model costs."""

import time

import torch
from torch import nn

from cqlora.model.load import find_decoder, find_head
from cqlora.model.loss import OutputHead


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of large square matrix products on this device, the best of repeated products over `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    # A generator of its own: a resumed run measures again, and must draw the dropout masks that it would have.
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    right = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    best, deadline = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        _synchronize(device)
        started = time.perf_counter()
        torch.mm(left, right)
        _synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def count_flops_per_token(model: nn.Module) -> tuple[int, int]:
    """Matrix-product operations of a training step, per token of the blocks and per label token of the head.

    A frozen matrix is multiplied forward and once backward (4 FLOP a weight); a trained one twice backward (6).
    """
    multiplied = sum(_weights(module) for module in find_decoder(model).modules() if isinstance(module, nn.Linear))
    trained = sum(p.numel() for p in find_decoder(model).parameters() if p.requires_grad)
    rows, columns = OutputHead.from_module(find_head(model)).weight.shape
    return 4 * (multiplied - trained) + 6 * trained, 4 * rows * columns


def _weights(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
