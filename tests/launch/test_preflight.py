"""What this machine or these folders cannot do is said before anything heavy is imported."""

import re
import subprocess

import pytest

from cqlora.config.choices import Checkpointing, Embeddings
from cqlora.config.schema import HardwareConfig
from cqlora.errors import ConfigError, DataError, DoesNotFit, ModelError
from cqlora.launch.preflight import check_tracker
from cqlora.launch.settle import misses_gpus, probe_for
from cqlora.system.machine import list_gpus
from tests.runs import typed_run


def pretend_gpus(monkeypatch, *memory_mib: int) -> None:
    """Let nvidia-smi say that these GPUs are present."""
    show_gpus(monkeypatch, "".join(f"GPU-{i}abc, {mib}, 8.0, {mib}, [N/A]\n" for i, mib in enumerate(memory_mib)))


def show_gpus(monkeypatch, rows: str) -> None:
    """Let nvidia-smi print these rows."""
    monkeypatch.setattr("cqlora.system.machine.which", lambda name: f"/usr/bin/{name}")
    answer = subprocess.CompletedProcess([], 0, stdout=rows)
    monkeypatch.setattr("cqlora.system.machine.subprocess.run", lambda *a, **k: answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)


def four_a100() -> HardwareConfig:
    return HardwareConfig(name="4xa100", processes_per_node=4, strategy="ddp", gpu_memory_gib=79.2)


def missing(hardware: HardwareConfig) -> str | None:
    return misses_gpus(hardware, probe_for(hardware))


def test_gpus_that_are_missing_or_smaller_than_counted_on_are_named(monkeypatch):
    for memory, message in (
        ((), r"needs 4 GPUs .* has none; .*cqlora plan.*hardware=cpu"),
        ((81920, 81920), "has 2"),
        ((40960, 40960, 40960, 40960), r"79.2 GiB a GPU .* 40.0 GiB; choose the group of your cards"),
    ):
        pretend_gpus(monkeypatch, *memory)
        assert re.search(message, missing(four_a100()) or "")
    pretend_gpus(monkeypatch, 81920, 81920, 81920, 81920)
    assert missing(four_a100()) is None


def test_a_run_on_gpus_that_are_not_there_is_refused(workspace, monkeypatch):
    pretend_gpus(monkeypatch, 81920)
    with pytest.raises(ConfigError, match=r"hardware=4xa100 needs 4 GPUs on this machine, which has 1; .*=cpu\."):
        typed_run(workspace, "stage=pretrain", "hardware=4xa100", "stage.global_batch_size=4")


def test_a_task_that_srun_shows_its_own_gpu_alone_may_start(monkeypatch):
    pretend_gpus(monkeypatch, 81920)
    assert "has 1" in (missing(four_a100()) or "")
    task = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"}
    for name, value in task.items():
        monkeypatch.setenv(name, value)
    assert missing(four_a100()) is None


def test_what_cannot_fit_is_refused_with_what_would_and_started_when_that_is_typed(workspace):
    small = ("stage=pretrain", "hardware.host_memory_gib=0.01")
    with pytest.raises(
        DoesNotFit, match=r"needs [\d.]+ GiB per process, and hardware=cpu has 0\.0; .*allow_misfit=true"
    ):
        typed_run(workspace, *small)
    assert typed_run(workspace, *small, "hardware.allow_misfit=true").hardware.allow_misfit


@pytest.mark.parametrize("layout", [(), ("hardware=2xcpu", "stage.global_batch_size=2"), ("stage=sft",)])
def test_what_the_readme_runs_on_a_processor_is_never_refused(layout, workspace):
    """On a machine of four GiB."""
    typed_run(workspace, "stage=pretrain", *layout, "hardware.host_memory_gib=4")


def test_only_visible_gpus_count_in_the_order_that_names_them(monkeypatch):
    pretend_gpus(monkeypatch, 24576, 24576, 40960)
    for visible, memory in (
        ("0,GPU-2abc", [24.0, 40.0]),
        ("2, 0", [40.0, 24.0]),
        ("0,-1,2", [24.0]),
        ("0,7,2", [24.0]),
        ("GPU-9", []),
        ("", []),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [gpu.memory_gib for gpu in list_gpus()] == memory, visible


def test_gpus_are_numbered_as_cuda_does_and_what_the_driver_does_not_tell_is_no_traceback(monkeypatch):
    show_gpus(monkeypatch, "GPU-a, 15360, 7.5, 15000, [N/A]\nGPU-b, [N/A], 9.0, [N/A], Disabled\n")
    assert [(gpu.capability, gpu.memory_gib) for gpu in list_gpus()] == [((9, 0), 0.0), ((7, 5), 15.0)]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert [gpu.capability for gpu in list_gpus()] == [(7, 5), (9, 0)]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("MIG-2222", [71.0]), ("MIG-3333", []), ("MIG-2222,MIG-1111", [71.0]), ("MIG-4444", [35.0]),
        # By number, or where nothing is said, CUDA takes the first part of a divided GPU.
        (None, [18.0]), ("0", [18.0]), ("GPU-aa", [18.0]), ("GPU-bb", []),
    ],
)  # fmt: skip
def test_a_part_of_a_gpu_counts_alone_with_its_own_memory(visible, expected, monkeypatch):
    listed = (
        "GPU 0: NVIDIA H200 (UUID: GPU-aa)\n"
        "  MIG 1g.18gb     Device  0: (UUID: MIG-1111)\n  MIG 3g.71gb     Device  1: (UUID: MIG-2222)\n"
        "  MIG 1c.2g.35gb  Device  2: (UUID: MIG-4444)\n"
    )
    show_gpus(monkeypatch, "")
    monkeypatch.setattr(
        "cqlora.system.machine.subprocess.run",
        lambda words, **k: subprocess.CompletedProcess(
            [], 0, stdout=listed if words[1] == "-L" else "GPU-aa, 143360, 9.0, 140000, Enabled\n"
        ),
    )
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [(gpu.memory_gib, gpu.capability) for gpu in list_gpus()] == [(each, (9, 0)) for each in expected]


class Cuda:
    """libcuda of two GPUs: calls return 0 where they succeed, and write through pointers."""

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def cuInit(self, flags):  # noqa: N802
        return self.code

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, gpu, number):  # noqa: N802
        gpu._obj.value = number
        return 0

    def cuDeviceTotalMem_v2(self, memory, gpu):  # noqa: N802
        memory._obj.value = (80 - gpu.value) << 30
        return 0

    def cuDeviceGetAttribute(self, value, attribute, gpu):  # noqa: N802
        value._obj.value = {75: 9, 76: gpu.value}[attribute]
        return 0


def test_without_nvidia_smi_cuda_itself_is_asked(monkeypatch):
    monkeypatch.setattr("cqlora.system.machine.which", lambda name: None)
    monkeypatch.setattr("cqlora.system.machine.ctypes.CDLL", lambda name: Cuda())
    assert [(gpu.memory_gib, gpu.capability) for gpu in list_gpus()] == [(80.0, (9, 0)), (79.0, (9, 1))]
    monkeypatch.setattr("cqlora.system.machine.ctypes.CDLL", lambda name: Cuda(code=100))
    assert list_gpus() == ()


def test_missing_folders_and_sources_are_one_sentence_with_what_to_type(workspace, tmp_path):
    with pytest.raises(ModelError, match="cqlora fetch"):
        typed_run(workspace, "stage=pretrain", "model=smollm2_135m", f"model.path={tmp_path}/smollm2_135m")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        typed_run(workspace, "stage=pretrain", "model=llama_7b", f"model.path={tmp_path}/empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        typed_run(workspace, "stage=pretrain", "model=llama_7b", f"model.path={tmp_path}/empty")
    with pytest.raises(DataError, match="dialog"):
        typed_run(workspace, "stage=sft", "data=dialog")
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        typed_run(workspace, "stage=sft", f"stage.init_adapter={tmp_path}")


def test_new_rows_on_a_base_that_has_none_are_refused_and_auto_settles(workspace):
    with pytest.raises(ConfigError, match=r"stage\.embeddings=new_rows.*cqlora extend"):
        typed_run(workspace, "stage=pretrain", "stage.embeddings=new_rows")
    assert typed_run(workspace, "stage=pretrain").stage.embeddings is Embeddings.frozen


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["stage.optimizer=paged_adamw_8bit"], "use stage.optimizer=adamw_8bit"),
        (["lora.method=dora", "model.quantization=int8"], "use model.quantization=nf4"),
    ],
)
def test_what_a_processor_cannot_do_is_refused(overrides, words, workspace):
    with pytest.raises(ConfigError, match=words):
        typed_run(workspace, "stage=pretrain", *overrides)


def test_activation_checkpointing_is_as_little_as_fits(workspace):
    roomy = typed_run(workspace, "stage=pretrain")
    assert roomy.hardware.activation_checkpointing is Checkpointing.none
    tight = typed_run(workspace, "stage=pretrain", "hardware.host_memory_gib=0.001", "hardware.allow_misfit=true")
    assert tight.hardware.activation_checkpointing is Checkpointing.full


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(workspace, monkeypatch):
    monkeypatch.setattr("cqlora.launch.preflight.find_spec", lambda name: None)
    for name in ("trackio", "mlflow", "tensorboard"):
        with pytest.raises(
            ConfigError, match=rf"tracking={name} needs its package; type `pip install 'cqlora\[{name}\]"
        ):
            check_tracker(typed_run(workspace, "stage=sft", f"tracking={name}"))
    check_tracker(typed_run(workspace, "stage=sft", "tracking=none"))
