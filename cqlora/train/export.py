"""A checkpoint's trained values as an adapter folder, without the base's weights being loaded."""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from cqlora.base import Base, read_base
from cqlora.config.choices import AdapterMethod, Strategy
from cqlora.config.run_yaml import RUN_FILE, describe_config, load_run_yaml
from cqlora.config.schema import RunConfig
from cqlora.data.templates import form_of_stage
from cqlora.errors import CheckpointError
from cqlora.lineage import describe_lineage
from cqlora.model.adapters import adapter_state, keeps_shape, peft_config, save_adapter
from cqlora.model.load import COMPUTE_DTYPES, quantization_config
from cqlora.model.pissa import convert_to_lora
from cqlora.positions import describe_positions
from cqlora.train.checkpoint import CheckpointStore, find_damage, read_manifest

logger = logging.getLogger(__name__)

_TRAINED = "trainable-rank"


def find_checkpoint(run: Path, name: str) -> Path:
    """The named checkpoint of a run, or its newest one, every byte of it as it was written.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    root = run / "checkpoints"
    if name:
        damage = find_damage(root / name) if (root / name).is_dir() else "it is not there"
        if damage:
            there = ", ".join(sorted(each.name for each in root.glob("step-*") if each.is_dir())) or "none"
            raise CheckpointError(f"checkpoint={name} cannot be used ({damage}); {root} holds {there}.")
        return root / name
    newest = CheckpointStore(root, keep_last=1).find_newest(
        lambda folder, damage: logger.warning("%s is damaged (%s) and passed over", folder, damage)
    )
    if newest is None:
        raise CheckpointError(f"{run} has no checkpoint yet; wait for its first, or give another run.")
    return newest


def export_checkpoint(run: Path, checkpoint: Path, folder: Path) -> None:
    """Write what a verified checkpoint has trained as plain PEFT, as the run itself would if it ended here.

    Raises:
        CheckpointError: the checkpoint is of another configuration than the run's.
        ConfigError, ModelError: the run's run.yaml or its base is missing or damaged.
    """
    config = load_run_yaml(run / RUN_FILE)
    base = read_base(config.model.path)
    model = build_skeleton(config, base)
    fill(model, read_trained(config, checkpoint), checkpoint)
    state = adapter_state(model)
    if config.lora.method is AdapterMethod.pissa:
        state = convert_to_lora(model, state, run)
    save_adapter(model, folder, base, state, config.stage.name, describe_card(config))


def describe_card(config: RunConfig) -> dict[str, Any]:
    """What an adapter's card says of its past, of the settled values it trains with, and of how it is asked."""
    lora = describe_config(config)["lora"]
    names = ("method", "rank", "alpha", "dropout", "target_modules")
    adapter = {name: lora[name] for name in names} | {"embeddings": config.stage.embeddings.name}
    form = form_of_stage(config.stage, Path(config.model.path))
    said = form.describe() | describe_positions(config.model.rope_scaling, config.model.rope_factor)
    return describe_lineage(config.stage.init_adapter) | {"adapter": adapter} | said


def build_skeleton(config: RunConfig, base: Base) -> PeftModel:
    """The adapted model with names and shapes, and no numbers."""
    stage, dtype = config.stage, COMPUTE_DTYPES[config.hardware.precision]
    shape: Any = AutoConfig.from_pretrained(base.path, local_files_only=True)
    shape.tie_word_embeddings = base.tied
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        model.config.quantization_config = quantization_config(config.model, config.hardware, dtype)
        if keeps_shape(config.lora, stage.init_adapter):
            adapter = PeftLoraConfig.from_pretrained(stage.init_adapter, inference_mode=False)
        else:
            adapter = peft_config(model, base, config.lora, stage.embeddings)
        adapted: PeftModel = get_peft_model(model, adapter)
    return adapted


def read_trained(config: RunConfig, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every trained tensor, whole, under its name in the adapted model."""
    files = sorted(
        (name for name in read_manifest(checkpoint) if name.startswith(_TRAINED)),
        key=lambda name: int(name.removeprefix(_TRAINED).partition(".")[0]),
    )
    parts = [load_file(checkpoint / name) for name in files]
    sharded = config.hardware.strategy is Strategy.fsdp
    # fully_shard splits a tensor by its rows, in the order of the ranks.
    return {
        name.removeprefix("module.").removeprefix("model."): torch.cat([part[name] for part in parts])
        if sharded
        else tensor
        for name, tensor in parts[0].items()
    }


def fill(model: nn.Module, trained: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Put trained tensors where they belong."""
    expected = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    different = sorted(expected.keys() ^ trained.keys()) or sorted(
        name for name, tensor in trained.items() if tensor.shape != expected[name].shape
    )
    if different:
        raise CheckpointError(
            f"{checkpoint} does not belong to its run's {RUN_FILE}: {different[0]} differs; give another checkpoint."
        )
    for name, tensor in trained.items():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        parameter = nn.Parameter(tensor)
        if isinstance(module, nn.ParameterDict):
            module[last] = parameter
        else:
            setattr(module, last, parameter)
