"""Embedding matrices that train whole are held in float32, whatever the model computes in.

PEFT's copy of a saved module has the base's type. In bfloat16 a step smaller than 1/256 of a number rounds to
nothing, so most of a matrix would never move; in float16 the loss scaler refuses such gradients altogether.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn


def keep_masters(model: PeftModel) -> int:
    """Turn every module that PEFT trains whole to float32; return how many there are.

    Their output keeps the base's type. A matrix that input and output share stays one.
    """
    masters = 0
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        dtype = wrapper.original_module.weight.dtype
        for module in wrapper.modules_to_save.values():
            masters += 1
            if dtype is not torch.float32:
                _hold_in_float32(module, dtype)
    return masters


def restore_masters(model: PeftModel, weights: Path) -> None:
    """Read an adapter's weights again where loading them rounded those of `keep_masters` to the base's type."""
    set_peft_model_state_dict(model, load_file(weights))


def _hold_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    # In place, so that tied modules keep their one parameter. Hooks, since a module's forward may be an
    # instance's own where layers are spread over GPUs.
    module.float()

    def widen(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(each.float() if torch.is_floating_point(each) else each for each in arguments)

    def narrow(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.to(dtype)

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(narrow)
