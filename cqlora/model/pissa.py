"""PiSSA (2404.02948): the adapter starts as the principal part of each matrix, the frozen base keeps the rest.

The decomposition is of the base's own 16-bit weights, and what is left is quantised anew (QPiSSA, section
3.2), since decomposing weights that were quantised already would keep their error. When training ends the
adapter is rewritten as a plain LoRA of twice the rank that goes onto the untouched base (section 4).
"""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save

from cqlora.base import Base
from cqlora.errors import CheckpointError
from cqlora.system.durable import replace_file
from cqlora.system.tensor_files import list_tensor_files

INITIAL_FILE = "pissa_initial.safetensors"
_PEFT_PREFIX = "base_model.model."


def initialise_pissa(model: PeftModel, base: Base, run_folder: Path, iterations: int, seed: int) -> None:
    """Set every adapted matrix to its principal part and its base to the residual.

    The starting adapter is kept in the run's folder: a resumed run, and every other rank, takes the same
    residual from it, and the final adapter is written relative to it.
    """
    file = run_folder / INITIAL_FILE
    stored = load_file(file) if file.is_file() else {}
    initial: dict[str, torch.Tensor] = {}
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    for name, layer in adapted_layers(model):
        weight = read_weight(base, name)
        if stored:
            down, up = stored[f"{name}.lora_A"], stored[f"{name}.lora_B"]
        else:
            down, up = principal_part(weight, layer.r["default"], layer.scaling["default"], iterations)
        initial[f"{name}.lora_A"], initial[f"{name}.lora_B"] = down, up
        _set_layer(layer, down, up, weight - layer.scaling["default"] * (up @ down))
    torch.set_rng_state(generator_state)
    if not stored:
        replace_file(file, save(initial))


def principal_part(
    weight: torch.Tensor, rank: int, scaling: float, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) with `scaling`·B·A the best rank-r approximation of `weight` (out, in)."""
    if iterations:
        left, values, right = torch.svd_lowrank(weight, rank, niter=iterations)
        right = right.T
    else:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    root = (values / scaling).sqrt()
    return (root[:, None] * right).contiguous(), (left * root).contiguous()


def adapted_layers(model: PeftModel) -> list[tuple[str, Any]]:
    """Each adapted linear layer under its name in the base's weight files."""
    return [
        (name.removeprefix(_PEFT_PREFIX), module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.lora_A
    ]


def read_weight(base: Base, name: str) -> torch.Tensor:
    """One matrix of the base as float32, from whichever file holds it."""
    for file in list_tensor_files(base.path):
        with safe_open(file, framework="pt") as shard:
            if f"{name}.weight" in shard.keys():  # noqa: SIM118 - not a mapping
                tensor: torch.Tensor = shard.get_tensor(f"{name}.weight")
                return tensor.float()
    raise CheckpointError(f"{base.path} has no tensor {name}.weight; convert the base again.")


def convert_to_lora(model: PeftModel, state: dict[str, torch.Tensor], run_folder: Path) -> dict[str, torch.Tensor]:
    """The trained adapter as a LoRA of twice the rank on the untouched base: [B, -B₀]·[A; A₀]."""
    initial = load_file(run_folder / INITIAL_FILE)
    converted = dict(state)
    for name, _ in adapted_layers(model):
        down, up = f"{_PEFT_PREFIX}{name}.lora_A.weight", f"{_PEFT_PREFIX}{name}.lora_B.weight"
        converted[down] = torch.cat([state[down], initial[f"{name}.lora_A"]]).contiguous()
        converted[up] = torch.cat([state[up], -initial[f"{name}.lora_B"]], dim=1).contiguous()
    return converted


@torch.no_grad()
def _set_layer(layer: Any, down: torch.Tensor, up: torch.Tensor, residual: torch.Tensor) -> None:
    layer.lora_A["default"].weight.copy_(down)
    layer.lora_B["default"].weight.copy_(up)
    linear = layer.get_base_layer()
    weight = linear.weight
    if isinstance(weight, bnb.nn.Params4bit):
        compute = linear.compute_dtype or torch.float32
        linear.weight = bnb.nn.Params4bit(
            residual.to(compute),
            requires_grad=False,
            quant_type=weight.quant_type,
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_storage=weight.quant_storage,
            module=linear,
        ).to(weight.device)
    elif isinstance(weight, bnb.nn.Int8Params):
        quantized = bnb.nn.Int8Params(residual.half(), requires_grad=False, has_fp16_weights=False)
        linear.weight = quantized.to(weight.device)
        linear.state = bnb.MatmulLtState()
        linear.state.has_fp16_weights, linear.state.threshold = False, 6.0
    else:
        weight.copy_(residual)
