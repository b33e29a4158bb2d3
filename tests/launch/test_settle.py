"""Settling: nothing is left to `auto`, the argument stays as it was, and plan, run, folder and resumption agree."""

import copy
import json
import shutil
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cqlora.config.choices import Attention, Checkpointing, Device, Embeddings, Kernels, Optimizer, Precision
from cqlora.config.diagnosis import to_schema
from cqlora.config.schema import CONFIG_DIR, SETTLED, SETTLED_KEYS, RunConfig, register_schemas
from cqlora.errors import CheckpointError, ConfigError
from cqlora.launch.preflight import check_kernels, check_run
from cqlora.launch.settle import Given, describe_machine, look_ahead, look_around, read_earlier, settle
from cqlora.plan.workload import Rows
from cqlora.system.machine import Gpu, Machine
from tests.runs import SMALL, adapter_sha256, events, finish_run, losses, read_state, typed_run

MACHINES = {
    "plain processor": Machine(memory_gib=16.0),
    "processor with bfloat16 units": Machine(memory_gib=64.0, bfloat16_units=True),
    "one 24 GB Ampere": Machine(gpus=(Gpu(memory_gib=23.7, capability=(8, 6)),), memory_gib=64.0),
    "one 24 GB Ampere, new torch": Machine(
        gpus=(Gpu(memory_gib=23.7, capability=(8, 6)),), memory_gib=64.0, varlen_attention=True, triton=True
    ),
    "one T4": Machine(gpus=(Gpu(memory_gib=15.0, capability=(7, 5)),), memory_gib=32.0),
    "one T4 with Triton": Machine(gpus=(Gpu(memory_gib=15.0, capability=(7, 5)),), memory_gib=32.0, triton=True),
    "one P100": Machine(gpus=(Gpu(memory_gib=16.0, capability=(6, 0)),), memory_gib=32.0),
    "four A100": Machine(gpus=(Gpu(memory_gib=79.2, capability=(8, 0)),) * 4, memory_gib=512.0, flash_attention=True),
}
HARDWARE = sorted(file.stem for file in (CONFIG_DIR / "hardware").glob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (CONFIG_DIR / "experiment").glob("*.yaml"))
NOT_SETTLED = {"tracking.mode"}
"""See the docstring of `cqlora.launch.settle`."""


def composed(*overrides: str) -> RunConfig:
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        config: RunConfig = to_schema(compose("config", list(overrides)), RunConfig)
    return config


def given(config: RunConfig, machine: str, added: int = 0, **more) -> Given:
    return Given(machine=MACHINES[machine], rows=Rows(config.model.vocab_size + added, added), **more)


def choices(config: object, prefix: str = "") -> dict[str, Enum]:
    """Every named choice of a configuration, by its dotted key."""
    found: dict[str, Enum] = {}
    for each in fields(config):  # type: ignore[arg-type]
        value = getattr(config, each.name)
        if is_dataclass(value):
            found |= choices(value, f"{prefix}{each.name}.")
        elif isinstance(value, Enum):
            found[prefix + each.name] = value
    return found


def left(config: RunConfig) -> set[str]:
    return {key for key, value in choices(config).items() if value.name == "auto"} - NOT_SETTLED


@pytest.fixture(scope="module")
def presets() -> list[RunConfig]:
    """Every hardware group and every experiment, as a user would compose it."""
    of_machines = [composed("stage=pretrain", "data=sample", f"hardware={name}") for name in HARDWARE]
    return of_machines + [composed(f"experiment={name}", "hardware=auto") for name in EXPERIMENTS]


def test_every_choice_that_may_be_auto_is_settled_or_named_as_settled_elsewhere():
    may_be = {key for key, value in choices(composed("stage=sft")).items() if "auto" in type(value).__members__}
    assert may_be == (SETTLED_KEYS | NOT_SETTLED) - {"hardware.gradient_scaler"}


@pytest.mark.parametrize("machine", MACHINES)
def test_nothing_is_left_to_auto_and_the_argument_stays_as_it_was(machine, presets):
    assert len(presets) > 20
    for config in presets:
        before = copy.deepcopy(config)
        settled = settle(config, given(config, machine))
        assert left(config) and not left(settled)
        assert config == before and settled is not config
        assert type(settled) is type(config)
        # Settling what is settled changes nothing, so no reader can come to another value.
        assert settle(settled, given(config, machine)) == settled


@pytest.mark.parametrize(
    "machine, device, precision, attention",
    [
        ("plain processor", Device.cpu, Precision.float32, Attention.documents),
        ("processor with bfloat16 units", Device.cpu, Precision.bfloat16, Attention.documents),
        ("one 24 GB Ampere", Device.cuda, Precision.bfloat16, Attention.documents),
        ("one 24 GB Ampere, new torch", Device.cuda, Precision.bfloat16, Attention.varlen),
        ("one T4", Device.cuda, Precision.float16, Attention.documents),
        ("one P100", Device.cuda, Precision.float32, Attention.documents),
        ("four A100", Device.cuda, Precision.bfloat16, Attention.flash),
    ],
)
def test_each_machine_computes_in_what_it_has_units_for(machine, device, precision, attention):
    config = composed("stage=pretrain", "hardware=auto")
    settled = settle(config, given(config, machine))
    assert (settled.hardware.device, settled.hardware.precision) == (device, precision)
    assert settled.model.attention is attention
    assert settled.stage.optimizer is Optimizer.adamw
    assert settled.hardware.gradient_scaler == (precision is Precision.float16)


@pytest.mark.parametrize(
    "machine, kernels, refusal",
    [
        ("plain processor", Kernels.plain, "a GPU, not hardware.device=cpu"),
        ("one 24 GB Ampere", Kernels.plain, "the package triton"),
        ("one 24 GB Ampere, new torch", Kernels.triton, ""),
        ("one T4 with Triton", Kernels.plain, "a GPU of compute capability 8.0 or later"),
    ],
)
def test_kernels_are_chosen_where_they_compile_and_refused_elsewhere(machine, kernels, refusal):
    assert settle_on(machine, "hardware=auto").hardware.kernels is kernels
    typed = settle_on(machine, "hardware=auto", "hardware.kernels=triton")
    met = given(typed, machine)
    if refusal:
        with pytest.raises(ConfigError, match=f"needs {refusal}; use hardware.kernels=plain"):
            check_kernels(typed, met)
    else:
        check_kernels(typed, met)
    check_kernels(settle_on(machine, "hardware=auto", "hardware.kernels=plain"), met)


def settle_on(machine, *overrides):
    config = composed("stage=pretrain", "data=sample", *overrides)
    return settle(config, given(config, machine))


def test_a_run_that_began_without_kernels_goes_on_without():
    config = composed("stage=pretrain", "data=sample", "hardware=auto")
    machine = "one 24 GB Ampere, new torch"
    earlier = earlier_of(settle(config, given(config, "one 24 GB Ampere")))
    assert earlier["hardware.kernels"] == "plain"
    assert settle(config, given(config, machine, earlier=earlier)).hardware.kernels is Kernels.plain


def test_float16_is_not_chosen_where_losses_cannot_be_scaled():
    overrides = ("stage=pretrain", "hardware=2x3090", "hardware.precision=auto", "hardware.gpu_memory_gib=15")
    config = composed(*overrides)
    t4s = Machine(gpus=MACHINES["one T4"].gpus * 2, memory_gib=64.0)
    assert settle(config, Given(machine=t4s, rows=Rows(2048))).hardware.precision is Precision.float32


def test_embeddings_follow_the_base_and_activations_the_memory():
    config = composed("stage=pretrain", "model=llama2_7b", "hardware=auto", "hardware.micro_batch_size=1")
    ampere = settle(config, given(config, "one 24 GB Ampere"))
    assert ampere.stage.embeddings is Embeddings.frozen
    assert settle(config, given(config, "one 24 GB Ampere", added=20_000)).stage.embeddings is Embeddings.new_rows
    wide = replace(config, hardware=replace(config.hardware, micro_batch_size=4))
    assert settle(wide, given(wide, "one 24 GB Ampere")).hardware.activation_checkpointing is Checkpointing.full
    assert settle(wide, given(wide, "four A100")).hardware.activation_checkpointing is Checkpointing.none


def test_a_group_means_this_machine_where_it_has_the_gpus_and_a_described_one_elsewhere():
    config = composed("stage=pretrain", "hardware=4xa100")
    assert describe_machine(config.hardware, MACHINES["four A100"]) is MACHINES["four A100"]
    elsewhere = describe_machine(config.hardware, MACHINES["one T4"])
    assert [gpu.memory_gib for gpu in elsewhere.gpus] == [79.2] * 4 and not elsewhere.memory_gib
    unsure = replace(config, hardware=replace(config.hardware, precision=Precision.auto))
    assert settle(unsure, given(unsure, "one T4")).hardware.precision is Precision.bfloat16


@pytest.mark.parametrize("machine", MACHINES)
def test_plan_and_run_settle_to_the_same_values(machine, workspace, monkeypatch):
    monkeypatch.setattr("cqlora.launch.settle.probe_machine", lambda look_for_gpus: MACHINES[machine])
    tiny = str(typed_run(workspace, "stage=pretrain").model.path)
    for stage in ("pretrain", "sft"):
        config = composed(f"stage={stage}", "model=tiny", "data=sample", "hardware=auto", f"model.path={tiny}")
        assert settle(config, look_ahead(config)) == settle(config, look_around(config, workspace / "none"))


def test_gpus_that_groups_describe_leave_nothing_to_settle(presets):
    """The planner offers no other machine: its GPUs are not here to be asked."""
    described = [config.hardware for config in presets if config.hardware.gpu_memory_gib]
    assert len(described) > 10
    for hardware in described:
        assert hardware.device is Device.cuda and hardware.precision is not Precision.auto, hardware.name


def earlier_of(config: RunConfig) -> dict[str, str]:
    found = choices(config)
    return {key: found[key].name for key in SETTLED_KEYS if key in found}


def test_a_run_that_goes_on_keeps_what_it_was_started_with():
    config = composed("stage=pretrain", "hardware=auto")
    started = settle(config, given(config, "processor with bfloat16 units"))
    resumed = settle(config, given(config, "plain processor", earlier=earlier_of(started)))
    assert resumed.hardware.precision is Precision.bfloat16
    assert {**earlier_of(resumed)} == earlier_of(started)


@pytest.mark.parametrize(
    "before, now, message",
    [
        ("one 24 GB Ampere", "plain processor", "hardware.device=cuda and this machine has no GPU"),
        ("one 24 GB Ampere", "one T4", "hardware.precision=bfloat16 and this machine has a GPU that only emulates it"),
        ("four A100", "one 24 GB Ampere", "model.attention=flash and this machine has nothing to run it"),
        ("one 24 GB Ampere, new torch", "one 24 GB Ampere", "attention=varlen and this machine has nothing to run it"),
    ],
)
def test_a_run_that_cannot_go_on_here_as_it_was_started_is_refused(before, now, message):
    config = composed("stage=pretrain", "data=sample", "hardware=auto")
    here = given(config, now, earlier=earlier_of(settle(config, given(config, before))))
    with pytest.raises(CheckpointError) as refused:
        check_run(settle(config, here), here)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_of_before_with_auto_in_it_means_what_auto_was_then():
    """A T4 computed in float32, and whoever types another type now is told."""
    config = composed("stage=pretrain", "hardware=auto")
    earlier = {"hardware.precision": "auto", "model.attention": "auto", "stage.optimizer": "auto"}
    assert settle(config, given(config, "one T4", earlier=earlier)).hardware.precision is Precision.float32
    typed = replace(config, hardware=replace(config.hardware, precision=Precision.bfloat16))
    with pytest.raises(CheckpointError, match=r"precision was auto .* is float32 here, and is bfloat16; leave"):
        settle(typed, given(typed, "one T4", earlier=earlier))


AUTO = ("hardware.precision=auto", "stage.max_steps=4", "stage.checkpoint_every_steps=2")


def test_run_yaml_holds_no_auto_and_an_older_folder_with_auto_goes_on_bit_by_bit(workspace, tmp_path):
    config = typed_run(workspace, "stage=pretrain", *AUTO)
    whole, old = tmp_path / "whole", tmp_path / "old"
    assert finish_run(config, whole) == 0
    written = OmegaConf.load(whole / "run.yaml")
    of_tuning = {"stage.template"}
    assert all(OmegaConf.select(written, key) not in ("auto", None) for key in SETTLED_KEYS - of_tuning)
    last = whole / "checkpoints" / "step-00000004"
    assert read_earlier(str(last), whole)["hardware.precision"] == config.hardware.precision.name
    assert read_state(last)["identity"]["hardware.gradient_scaler"] is False

    shutil.copytree(whole, old)
    shutil.rmtree(old / "checkpoints" / "step-00000004")
    make_older(old)
    again = typed_run(workspace, "stage=pretrain", *AUTO, folder=old)
    assert again == config and read_earlier("never", old) == {}
    assert finish_run(again, old) == 0
    assert "resumed" in events(old) and losses(old) == losses(whole)
    assert adapter_sha256(old) == adapter_sha256(whole)


def make_older(folder: Path) -> None:
    """A run's folder as a cqlora wrote it that left these values to the worker."""
    from cqlora.system.sealed import hash_file
    from cqlora.train.checkpoint import MANIFEST

    left_open = {"hardware.precision": "auto", "model.attention": "auto", "stage.optimizer": "auto"}
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        state = read_state(checkpoint)
        state["identity"] |= left_open
        (checkpoint / "state.json").write_text(json.dumps(state))
        digests = json.loads((checkpoint / MANIFEST).read_text())
        digests["state.json"] = hash_file(checkpoint / "state.json")
        (checkpoint / MANIFEST).write_text(json.dumps(digests))
    written = OmegaConf.load(folder / "run.yaml")
    for key, value in left_open.items():
        OmegaConf.update(written, key, value)
    OmegaConf.save(written, folder / "run.yaml")


def test_the_settled_keys_are_fields_of_their_groups():
    config = composed(*SMALL, "stage=sft")
    assert all(hasattr(getattr(config, group), name) for group, names in SETTLED.items() for name in names)
