"""What can be known to be wrong before anything heavy is imported: GPUs that are not there, folders, rows."""

import os

from cqlora.architectures import Part, require_known
from cqlora.base import Base, read_base
from cqlora.config.choices import AdapterMethod, Device, Embeddings, Optimizer, Quantization
from cqlora.config.schema import HardwareConfig, RunConfig
from cqlora.errors import ConfigError, DoesNotFit
from cqlora.launch.cluster import find_place
from cqlora.random_base import is_to_be_built
from cqlora.system.machine import list_gpus


def check_run(config: RunConfig) -> None:
    """Settle what is left to `auto`, and refuse what cannot start on this machine.

    Raises:
        ConfigError: GPUs are missing, new rows are asked for on a base that has none, or the adapter to continue
            was trained with other values.
        ModelError: the base's folder or the adapter to continue from is missing or unfit, or the base is of a kind
            that cqlora does not train.
        DataError: a source is nowhere to be found.
        DoesNotFit: the plan says that the machine cannot hold the run.
    """
    from cqlora.data.sources import find_sources
    from cqlora.launch.continuation import settle_continuation

    settle_device(config.hardware)
    check_device_support(config)
    base = None if is_to_be_built(config.model) else read_base(config.model.path)
    if base is not None:
        require_known(Part.train, base.config, base.path, config.stage.sequence_length)
    if config.stage.init_adapter:
        settle_continuation(config, base)
    settle_embeddings(config, base)
    settle_memory(config, base.added_rows if base else 0)
    find_sources(config.data, config.stage.name)


def settle_memory(config: RunConfig, added_rows: int) -> None:
    """Settle which activations are kept, and raise DoesNotFit, with what would fit, where none of it fits."""
    from cqlora.plan import Fit, judge, plan_memory, resolve_checkpointing

    config.hardware.activation_checkpointing = resolve_checkpointing(config, added_rows)
    if config.hardware.allow_misfit or plan_memory(config, added_rows).fit is not Fit.does_not_fit:
        return
    # Only here, since looking for what would fit takes longer than all other checks.
    raise DoesNotFit(
        f"{judge(config, added_rows).refusal.rstrip('.')}, or start it all the same with hardware.allow_misfit=true."
    )


def settle_device(hardware: HardwareConfig) -> None:
    """Turn `device=auto` into what this machine has, and compare the GPUs asked for with those present."""
    gpus = list_gpus() if hardware.device is not Device.cpu else []
    if hardware.device is Device.auto:
        hardware.device = Device.cuda if gpus else Device.cpu
        return
    needed = max(hardware.processes_per_node, hardware.gpus_per_node)
    if len(gpus) == 1 and find_place(os.environ) is not None:
        # srun may show each task the one GPU that is its own.
        needed = 1
    if hardware.device is Device.cuda and len(gpus) < needed:
        raise ConfigError(
            f"hardware={hardware.name} needs {needed} GPU{'s' * (needed > 1)} on this machine, which has "
            f"{len(gpus) or 'none'}; see what fits with `cqlora plan hardware={hardware.name} …`, or train here "
            "with hardware=cpu."
        )
    smallest = min(gpus[:needed], default=0.0)
    # A card's usable memory reads a little below its name: 79.2 GiB on an 80 GB A100.
    if hardware.device is Device.cuda and smallest < 0.95 * hardware.gpu_memory_gib:
        raise ConfigError(
            f"hardware={hardware.name} counts on {hardware.gpu_memory_gib:g} GiB a GPU and the smallest here has "
            f"{smallest:.1f} GiB; choose the group of your cards, or set hardware.gpu_memory_gib={smallest:.1f} "
            "and ask `cqlora plan`."
        )


def check_device_support(config: RunConfig) -> None:
    """Refuse on a processor what bitsandbytes has for GPUs only."""
    if config.hardware.device is not Device.cpu:
        return
    if config.stage.optimizer in (Optimizer.paged_adamw, Optimizer.paged_adamw_8bit):
        raise ConfigError(
            f"stage.optimizer={config.stage.optimizer.name} pages to a GPU's host memory and has none on a CPU; "
            f"use stage.optimizer={config.stage.optimizer.name.removeprefix('paged_')}."
        )
    if config.lora.method is AdapterMethod.dora and config.model.quantization is Quantization.int8:
        raise ConfigError("lora.method=dora cannot read model.quantization=int8 on a CPU; use model.quantization=nf4.")


def settle_embeddings(config: RunConfig, base: Base | None) -> None:
    """Turn `embeddings=auto` into new_rows on an extended base and frozen on any other."""
    extended = base is not None and base.added_rows > 0
    if config.stage.embeddings is Embeddings.auto:
        config.stage.embeddings = Embeddings.new_rows if extended else Embeddings.frozen
    config.stage.check_embeddings_rate()
    if config.stage.embeddings is Embeddings.new_rows and not extended:
        raise ConfigError(
            f"stage.embeddings=new_rows, but {config.model.path} has no added rows; extend it with `cqlora extend "
            "base=… output_dir=… vocab=…` first, or use stage.embeddings=frozen."
        )
