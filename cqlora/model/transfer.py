"""Copies to a GPU that the host does not wait for."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on `device`; only from pinned memory does a GPU copy while the host goes on."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
