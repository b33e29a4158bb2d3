"""Where `auto` becomes a value: a configuration and what it meets give one in which nothing is left to `auto`.

What is settled here is in `config.SETTLED`. Not here, since no step of a run depends on it or no run reads it:
`stage.resume` says what to do with a folder and is no value of the run (`resumption`); `tracking.mode` asks at every
start whether W&B has a key in the environment, which no file may tell (`tracking`); `data.workers=null` is a number
of processes that changes no token (`data`); `vocab.kind` is the tokenizer's, and of `convert` and `extend`
(`vocab.extension`); `precision`, `dtype`, `device` of `merge`, `chat` and `serve` are of a model that is read
(`weights`, `inference.form`).
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from cqlora.architectures import Part, require_known
from cqlora.base import Base, read_base
from cqlora.config.choices import Attention, Device, Embeddings, Kernels, Optimizer, Precision, Strategy, Template
from cqlora.config.schema import SETTLED_KEYS, HardwareConfig, RunConfig, SftConfig, StageConfig
from cqlora.errors import CheckpointError, ModelError
from cqlora.launch.cluster import find_rank_environment
from cqlora.launch.continuation import Fixed, read_fixed
from cqlora.plan.memory import choose_checkpointing
from cqlora.plan.workload import Rows
from cqlora.positions import scale_positions
from cqlora.random_base import is_to_be_built
from cqlora.system.documents import read_object, take
from cqlora.system.durable import recover_folders
from cqlora.system.machine import BFLOAT16_CAPABILITY, FLOAT16_CAPABILITY, Gpu, Machine, probe_machine
from cqlora.train.checkpoint import CheckpointStore

C = TypeVar("C", bound=RunConfig)
E = TypeVar("E", bound=Enum)


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What a configuration meets: all that `settle` and the checks after it read beside it."""

    machine: Machine
    base: Base | None = None
    """None where its folder is not there yet."""
    rows: Rows
    adapter: Fixed | None = None
    """What stage.init_adapter fixes."""
    template: Template = Template.chatml
    """What stage.template=auto is by the base alone."""
    earlier: Mapping[str, str] = field(default_factory=dict)
    """Values of the run to go on with, by dotted key; `auto` in a folder of a cqlora that did not settle it there."""


def settle(config: C, given: Given) -> C:
    """The configuration with nothing left to `auto`; a new object, and nothing but the two arguments is read.

    A run that goes on keeps what it was started with, since it is to be the run that never stopped.

    Raises:
        ConfigError: a value that the schema takes beside `auto` and not beside what that comes to.
        CheckpointError: a value is typed that is not what `auto` was when the run was started.
    """
    machine, earlier = describe_machine(config.hardware, given.machine), given.earlier
    hardware = _settle_hardware(config.hardware, machine, earlier)
    attention = _take("model.attention", config.model.attention, earlier, lambda: _attention(hardware, machine))
    optimizer = _take("stage.optimizer", config.stage.optimizer, earlier, lambda: Optimizer.adamw)
    embeddings = _take("stage.embeddings", config.stage.embeddings, earlier, lambda: _embeddings(given))
    settled = replace(
        config,
        model=replace(config.model, attention=attention),
        stage=settle_template(
            replace(config.stage, optimizer=optimizer, embeddings=embeddings), given.template, given.adapter, earlier
        ),
        hardware=hardware,
    )
    key, asked = "hardware.activation_checkpointing", hardware.activation_checkpointing
    checkpointing = _take(key, asked, earlier, lambda: choose_checkpointing(settled, given.rows))
    return replace(settled, hardware=replace(hardware, activation_checkpointing=checkpointing))


def settle_template(
    stage: StageConfig, of_base: Template, adapter: Fixed | None, earlier: Mapping[str, str]
) -> StageConfig:
    """The stage with its template: that of the adapter to continue where it was tuned in one, else the base's.

    Raises:
        CheckpointError: see settle.
    """
    if not isinstance(stage, SftConfig):
        return stage
    tuned = adapter.form if adapter else None
    chosen = tuned.name if tuned else of_base
    return replace(stage, template=_take("stage.template", stage.template, earlier, lambda: chosen))


def look_around(config: RunConfig, run_folder: Path) -> Given:
    """What a run meets on this machine, in its base's folder, and in its own where it goes on there.

    Raises:
        ModelError: the base or the adapter to continue from is missing, damaged, or of a kind that does not train.
    """
    base = None if is_to_be_built(config.model) else read_base(config.model.path)
    if base is not None:
        check_base(Part.train, config, base)
    return Given(
        machine=probe_for(config.hardware),
        base=base,
        rows=Rows(base.vocab_size, base.added_rows) if base else Rows(config.model.vocab_size),
        adapter=read_adapter(Path(config.stage.init_adapter)) if config.stage.init_adapter else None,
        template=find_template(config.stage, base),
        earlier=read_earlier(config.stage.resume, run_folder),
    )


def look_ahead(config: RunConfig, added_rows: int = 0) -> Given:
    """What a run would meet; its base and the adapter that it continues need not be there yet.

    Raises:
        ModelError: the base is of a kind that is not planned for, or the adapter is damaged.
    """
    try:
        base = read_base(config.model.path)
    except ModelError:
        base = None
    if base is not None:
        check_base(Part.plan, config, base)
    adapter = Path(config.stage.init_adapter)
    return Given(
        machine=probe_for(config.hardware),
        base=base,
        rows=Rows(base.vocab_size, base.added_rows) if base else Rows(config.model.vocab_size + added_rows, added_rows),
        adapter=read_adapter(adapter) if config.stage.init_adapter and adapter.is_dir() else None,
        template=find_template(config.stage, base),
    )


def check_base(part: Part, config: RunConfig, base: Base) -> None:
    """Raise ModelError for a base of a kind that a part does not know, or whose positions are scaled already."""
    require_known(part, base.config, base.path, config.stage.sequence_length)
    scale_positions(base.config, config.model.rope_scaling, config.model.rope_factor, base.path)


def find_template(stage: StageConfig, base: Base | None) -> Template:
    """What stage.template=auto is by the base alone; not looked for where it is not asked for."""
    asked = isinstance(stage, SftConfig) and stage.template is Template.auto
    if not asked or base is None:
        return Template.chatml
    # Brings numpy, which no other plan needs.
    from cqlora.data.templates import choose_by_base

    return choose_by_base(base.path)


def probe_for(hardware: HardwareConfig) -> Machine:
    """This machine, of which GPUs are of no interest to a run on the processor."""
    machine = probe_machine(hardware.device is not Device.cpu)
    return replace(machine, one_gpu_each=len(machine.gpus) == 1 and find_rank_environment(os.environ) is not None)


def read_adapter(folder: Path) -> Fixed:
    """What the adapter to continue fixes.

    Raises:
        ModelError: the folder holds none, or a damaged one.
    """
    recover_folders(folder.parent)
    return read_fixed(folder)


def read_earlier(resume: str, run_folder: Path) -> dict[str, str]:
    """The settled values of the run that `stage.resume` goes on with, from a checkpoint of it; none at a new start."""
    if resume == "never":
        return {}
    store = CheckpointStore(run_folder / "checkpoints", keep_last=1)
    for folder in store.committed() if resume == "auto" else [Path(resume)]:
        file = folder / "state.json"
        try:
            identity = take(read_object(file), "identity", file, dict)
        except ModelError:
            # Damaged, which is reported where checkpoints are verified.
            continue
        # Runs of before there were kernels went without.
        identity.setdefault("hardware.kernels", Kernels.plain.name)
        if identity.get("stage.name") == "sft":
            # An older cqlora had no other.
            identity = {"stage.template": "chatml"} | identity
        return {key: identity[key] for key in SETTLED_KEYS if isinstance(identity.get(key), str)}
    return {}


def describe_machine(hardware: HardwareConfig, here: Machine) -> Machine:
    """The machine that a hardware group means: this one where it has what the group counts on, else as described.

    The GPUs of a machine that is only described multiply bfloat16, as all of the groups do.
    """
    if hardware.device is not Device.cuda or misses_gpus(hardware, here) is None:
        return here
    gpu = Gpu(memory_gib=hardware.gpu_memory_gib, capability=BFLOAT16_CAPABILITY)
    return Machine(gpus=(gpu,) * count_gpus(hardware), flash_attention=False, varlen_attention=True, triton=True)


def misses_gpus(hardware: HardwareConfig, machine: Machine) -> str | None:
    """What a hardware group counts on and a machine has not, with what to do; None where it has it."""
    gpus, needed = machine.gpus, 1 if machine.one_gpu_each else count_gpus(hardware)
    if len(gpus) < needed:
        return (
            f"needs {needed} GPU{'s' * (needed > 1)} on this machine, which has {len(gpus) or 'none'}; see what fits "
            f"with `cqlora plan hardware={hardware.name} …`, or train here with hardware=cpu"
        )
    smallest = min(gpu.memory_gib for gpu in gpus[:needed])
    # A card's usable memory reads a little below its name: 79.2 GiB on an 80 GB A100.
    if 0 < smallest < 0.95 * hardware.gpu_memory_gib:
        return (
            f"counts on {hardware.gpu_memory_gib:g} GiB a GPU and the smallest here has {smallest:.1f} GiB; choose the "
            f"group of your cards, or set hardware.gpu_memory_gib={smallest:.1f} and ask `cqlora plan`"
        )
    return None


def count_gpus(hardware: HardwareConfig) -> int:
    """GPUs of one node."""
    return max(hardware.processes_per_node, hardware.gpus_per_node)


def choose_precision(device: Device, machine: Machine, gpus: int = 1, may_scale: bool = True) -> Precision:
    """The type to compute in unasked: bfloat16 where it is multiplied, float16 on older GPUs, else float32.

    Emulated bfloat16 is two to four times slower than float32 on a processor without AMX or AVX512-BF16. `may_scale`
    is whether losses can be scaled, which float16 needs.
    """
    if device is Device.cpu:
        return Precision.bfloat16 if machine.bfloat16_units else Precision.float32
    weakest = min((gpu.capability for gpu in machine.gpus[:gpus]), default=(0, 0))
    if weakest >= BFLOAT16_CAPABILITY:
        return Precision.bfloat16
    return Precision.float16 if may_scale and weakest >= FLOAT16_CAPABILITY else Precision.float32


def _settle_hardware(hardware: HardwareConfig, machine: Machine, earlier: Mapping[str, str]) -> HardwareConfig:
    """Device, precision and memory; which activations are kept depends on all else."""
    here = Device.cuda if machine.gpus else Device.cpu
    device = _take("hardware.device", hardware.device, earlier, lambda: here)
    key, gpus = "hardware.precision", count_gpus(hardware)
    # Before `auto` was settled here, it was never float16.
    may_scale = hardware.strategy is not Strategy.fsdp and earlier.get(key) != "auto"
    precision = _take(key, hardware.precision, earlier, lambda: choose_precision(device, machine, gpus, may_scale))
    of_gpus = min((gpu.memory_gib for gpu in machine.gpus[:gpus]), default=0.0) if device is Device.cuda else 0.0
    return replace(
        hardware,
        device=device,
        precision=precision,
        gradient_scaler=hardware.gradient_scaler or precision is Precision.float16,
        kernels=_take("hardware.kernels", hardware.kernels, earlier, lambda: _kernels(hardware, device, machine)),
        gpu_memory_gib=hardware.gpu_memory_gib or of_gpus,
        host_memory_gib=hardware.host_memory_gib or machine.memory_gib,
    )


def _attention(hardware: HardwareConfig, machine: Machine) -> Attention:
    """Flash attention over packed documents where it runs, flash-attn's or torch's own, else attention by document.

    It has no kernel for float32; `hardware` is settled but for which activations are kept.
    """
    if hardware.precision is Precision.float32:
        return Attention.documents
    if hardware.device is not Device.cuda or lacks_ampere(hardware, machine):
        return Attention.documents
    if machine.flash_attention:
        return Attention.flash
    return Attention.varlen if machine.varlen_attention else Attention.documents


def lacks_for_kernels(hardware: HardwareConfig, machine: Machine) -> str | None:
    """What Triton's kernels lack on a machine; None where they run."""
    if not machine.triton:
        return "the package triton"
    return "a GPU of compute capability 8.0 or later" if lacks_ampere(hardware, machine) else None


def _kernels(hardware: HardwareConfig, device: Device, machine: Machine) -> Kernels:
    """A kernel for each part of a block where Triton compiles it."""
    return Kernels.triton if device is Device.cuda and lacks_for_kernels(hardware, machine) is None else Kernels.plain


def lacks_ampere(hardware: HardwareConfig, machine: Machine) -> bool:
    """Whether a GPU of a run is older than Ampere."""
    return any(gpu.capability < BFLOAT16_CAPABILITY for gpu in machine.gpus[: count_gpus(hardware)])


def _embeddings(given: Given) -> Embeddings:
    """Those of the adapter to continue; else the added rows of an extended base, and nothing of any other."""
    if given.adapter is not None:
        return given.adapter.embeddings
    return Embeddings.new_rows if given.rows.added else Embeddings.frozen


def _take(key: str, asked: E, earlier: Mapping[str, str], choose: Callable[[], E]) -> E:
    """A value as asked for; for `auto` that of the run to go on with, else what is chosen."""
    kept: Any = type(asked).__members__.get(earlier.get(key, ""))
    if asked.name != "auto":
        if kept is not None and kept.name == "auto" and asked is not choose():
            raise CheckpointError(
                f"{key} was auto when the run was started, which is {choose().name} here, and is {asked.name}; leave "
                f"{key} out, or use another folder with hydra.run.dir=FOLDER."
            )
        return asked
    return choose() if kept is None or kept.name == "auto" else kept
