"""What can be known to be wrong before anything heavy is imported: GPUs that are not there, folders, rows."""

from importlib.util import find_spec

from cqlora.config.choices import (
    AdapterMethod,
    Attention,
    Device,
    Embeddings,
    Kernels,
    Optimizer,
    Precision,
    Quantization,
    Tracker,
)
from cqlora.config.schema import RunConfig
from cqlora.errors import CheckpointError, ConfigError, DoesNotFit
from cqlora.launch.continuation import check_continuation
from cqlora.launch.settle import Given, count_gpus, lacks_ampere, lacks_for_kernels, misses_gpus
from cqlora.plan.estimate import GIB
from cqlora.plan.fit import Fit
from cqlora.plan.memory import plan_memory
from cqlora.plan.verdict import judge


def check_run(config: RunConfig, given: Given) -> None:
    """Refuse a settled run that cannot start on this machine; nothing is changed.

    Raises:
        ConfigError: GPUs or a tracker's package are missing, new rows are asked for on a base that has none, or the
            adapter to continue was trained with other values.
        CheckpointError: the run to go on with needs what this machine has not.
        ModelError: the adapter to continue has rows of another extension, or the base's tokens do not make the chat
            template's.
        DataError: a source is nowhere to be found.
        DoesNotFit: the plan says that the machine cannot hold the run, or not beside what it holds now.
    """
    from cqlora.data.sources import find_sources

    check_tracker(config)
    check_earlier(config, given)
    check_gpus(config, given)
    check_device_support(config)
    check_kernels(config, given)
    if given.adapter is not None:
        check_continuation(config, given.adapter, given.base)
    check_embeddings(config, given)
    check_template(config, given)
    check_memory(config, given)
    check_free_memory(config, given)
    find_sources(config.data, config.stage.name)


def check_tracker(config: RunConfig) -> None:
    """Raise ConfigError where the tracker's package is not installed."""
    name = config.tracking.tracker.name
    if config.tracking.tracker is not Tracker.none and find_spec(name) is None:
        raise ConfigError(f"tracking={name} needs its package; type `pip install 'cqlora[{name}]'`.")


def check_earlier(config: RunConfig, given: Given) -> None:
    """Raise CheckpointError where a run goes on with a value that it was started with and this machine cannot."""
    hardware, machine = config.hardware, given.machine
    if hardware.device is not Device.cuda:
        return
    old = lacks_ampere(hardware, machine)
    packages = {Attention.flash: machine.flash_attention, Attention.varlen: machine.varlen_attention}
    attends = packages.get(config.model.attention, True) and not old
    compiles = lacks_for_kernels(hardware, machine) is None
    for key, value, lacking in (
        ("hardware.device", hardware.device, "no GPU" if not machine.gpus else ""),
        ("hardware.precision", hardware.precision, "a GPU that only emulates it" if old else ""),
        ("model.attention", config.model.attention, "" if attends else "nothing to run it"),
        ("hardware.kernels", hardware.kernels, "" if compiles else "nothing to run them"),
    ):
        needs = value in (Device.cuda, Precision.bfloat16, Kernels.triton, *packages)
        if needs and lacking and given.earlier.get(key) == value.name:
            raise CheckpointError(
                f"the run to go on with was started with {key}={value.name} and this machine has {lacking}; go on with "
                "it on a machine like that one, or start anew in another folder with hydra.run.dir=FOLDER."
            )


def check_gpus(config: RunConfig, given: Given) -> None:
    """Compare the GPUs that are asked for with those present."""
    missing = misses_gpus(config.hardware, given.machine) if config.hardware.device is Device.cuda else None
    if missing is not None:
        raise ConfigError(f"hardware={config.hardware.name} {missing}.")


def check_memory(config: RunConfig, given: Given) -> None:
    """Raise DoesNotFit, with what would fit, where the machine cannot hold the run."""
    if config.hardware.allow_misfit or plan_memory(config, given.rows).fit is not Fit.does_not_fit:
        return
    # Only here, since looking for what would fit takes longer than all other checks.
    raise DoesNotFit(
        f"{judge(config, given.rows).refusal.rstrip('.')}, or start it all the same with hardware.allow_misfit=true."
    )


def check_free_memory(config: RunConfig, given: Given) -> None:
    """Raise DoesNotFit where other programs hold so much of a GPU that the run's peak has no room beside them."""
    if config.hardware.allow_misfit or config.hardware.device is not Device.cuda:
        return
    peak_gib = plan_memory(config, given.rows).step / GIB
    for number, gpu in enumerate(given.machine.gpus[: count_gpus(config.hardware)]):
        if 0 < gpu.free_gib < peak_gib:
            raise DoesNotFit(
                f"GPU {number} has {gpu.free_gib:.1f} of its {gpu.memory_gib:.1f} GiB free, since other programs hold "
                f"the rest, and the run needs about {peak_gib:.1f} GiB; end them (nvidia-smi lists them), choose other "
                "GPUs with CUDA_VISIBLE_DEVICES, or start it all the same with hardware.allow_misfit=true."
            )


def check_device_support(config: RunConfig) -> None:
    """Refuse on a processor what bitsandbytes has for GPUs only, and a kernel in a type that it does not have."""
    attention = config.model.attention
    if attention in (Attention.flash, Attention.varlen) and config.hardware.precision is Precision.float32:
        raise ConfigError(
            f"model.attention={attention.name} has kernels for 16 bits only and hardware.precision=float32; use "
            "model.attention=documents, or hardware.precision=bfloat16."
        )
    if config.hardware.device is not Device.cpu:
        return
    if config.stage.optimizer in (Optimizer.paged_adamw, Optimizer.paged_adamw_8bit):
        raise ConfigError(
            f"stage.optimizer={config.stage.optimizer.name} pages to a GPU's host memory and has none on a CPU; "
            f"use stage.optimizer={config.stage.optimizer.name.removeprefix('paged_')}."
        )
    if config.lora.method is AdapterMethod.dora and config.model.quantization is Quantization.int8:
        raise ConfigError("lora.method=dora cannot read model.quantization=int8 on a CPU; use model.quantization=nf4.")


def check_kernels(config: RunConfig, given: Given) -> None:
    """Raise ConfigError where hardware.kernels=triton was typed and nothing here compiles them."""
    if config.hardware.kernels is not Kernels.triton:
        return
    on_gpu = config.hardware.device is Device.cuda
    lacking = lacks_for_kernels(config.hardware, given.machine) if on_gpu else "a GPU, not hardware.device=cpu"
    if lacking is not None:
        raise ConfigError(f"hardware.kernels=triton needs {lacking}; use hardware.kernels=plain.")


def check_template(config: RunConfig, given: Given) -> None:
    """Raise ModelError where nothing can be learned in the chat template with the base's tokens."""
    from cqlora.data.templates import form_of_stage
    from cqlora.data.tokenizer import PlainTokenizer

    if given.base is None:
        return
    form = form_of_stage(config.stage, given.base.path)
    if form.source:
        form.open(PlainTokenizer(given.base.path), given.base.path)


def check_embeddings(config: RunConfig, given: Given) -> None:
    """Raise ConfigError for new rows on a base that has none, and where nothing would train."""
    if config.stage.embeddings is Embeddings.new_rows and not (given.base and given.base.added_rows):
        raise ConfigError(
            f"stage.embeddings=new_rows, but {config.model.path} has no added rows; extend it with `cqlora extend "
            "base=… output_dir=… vocab=…` first, or use stage.embeddings=frozen."
        )
    if config.stage.embeddings is Embeddings.frozen and config.lora.method is AdapterMethod.none:
        raise ConfigError(
            "lora.method=none with frozen embeddings trains nothing; use a base with added rows, "
            "stage.embeddings=full, or lora.method=lora."
        )
