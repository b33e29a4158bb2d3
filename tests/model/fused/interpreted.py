"""Triton's kernels run by its interpreter, on the processor and in float32: what they compute without a GPU."""

import importlib
from types import ModuleType

import pytest


def interpret_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`cqlora.model.fused.kernels`, every kernel of which is interpreted until the test ends."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    kernels = importlib.import_module("cqlora.model.fused.kernels")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for name, value in list(vars(kernels).items()):
        if isinstance(value, JITFunction):
            monkeypatch.setattr(kernels, name, InterpretedFunction(value.fn))
    return kernels
