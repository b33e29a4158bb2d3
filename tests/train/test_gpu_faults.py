"""What a first run on a GPU may meet, told in a sentence; the driver and the allocator are stood in for."""

import pytest
import torch

from cqlora.config.choices import Attention, Device, Precision
from cqlora.errors import ConfigError, DoesNotFit, TrainingError
from cqlora.launch.preflight import check_device_support, check_free_memory
from cqlora.launch.settle import settle
from cqlora.model import placement
from cqlora.model.load import fill_nothing
from cqlora.plan.memory import plan_memory
from cqlora.system import cuda
from cqlora.system.machine import Gpu, Machine
from cqlora.train import distributed
from cqlora.train.memory import described_when_full, list_changes
from cqlora.train.optimizer import load_optimizer
from cqlora.train.trainer import peak_memory_gib
from tests.launch.test_settle import composed, given

SEVEN_B = ("stage=pretrain", "data=sample", "model=llama2_7b", "hardware=1xa100")


def test_a_gpu_that_the_driver_shows_and_torch_does_not_ends_the_run_with_both_versions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "read_driver_version", lambda: "470.82.01")
    config = settle(composed(*SEVEN_B), given(composed(*SEVEN_B), "four A100"))
    assert config.hardware.device is Device.cuda
    with (
        pytest.raises(
            ConfigError, match=r"torch \S+, built for CUDA 13.0, sees no GPU with the driver 470.82.01; .*=cpu"
        ),
        distributed.start_worker(config.hardware),
    ):
        pytest.fail("a run that is to be on a GPU has begun on the processor")


def test_a_build_for_processors_is_named_as_such(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cuda, "read_driver_version", lambda: "")
    with pytest.raises(ConfigError, match="a build for processors alone, sees no GPU; install"):
        cuda.require_cuda("hardware.device=cuda", instead="hardware=cpu")


@pytest.mark.parametrize(
    ("built", "own", "runs"),
    [
        (["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"], (7, 0), False),
        (["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"], (8, 6), True),
        (["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"], (10, 0), False),
        (["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"], (13, 0), True),
        (["sm_86"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        ([], (7, 0), True),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_said_to_be_one(built, own, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: own)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "Tesla V100")
    if runs:
        cuda.require_kernels(torch.device("cuda", 0), instead="hardware=cpu")
    else:
        with pytest.raises(ConfigError, match=rf"built for .*, and Tesla V100 is sm_{own[0]}{own[1]}; install"):
            cuda.require_kernels(torch.device("cuda", 0), instead="hardware=cpu")


def test_a_full_gpu_is_one_sentence_with_plan_and_peak_and_what_to_change():
    config = settle(composed(*SEVEN_B, "hardware.micro_batch_size=4"), given(composed(*SEVEN_B), "four A100"))
    with (
        pytest.raises(TrainingError) as raised,
        described_when_full(config, ()),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.25 GiB. GPU 0 has a total capacity of")
    told = str(raised.value)
    assert "1.25 GiB more was asked for" in told and "\n" not in told
    assert f"`cqlora plan` counts {plan_memory(config).step / 2**30:.1f} of 79.2 GiB" in told
    assert "hardware.micro_batch_size=2" in told and told.endswith("or a GPU with more memory.")


def test_a_worker_that_computes_on_several_gpus_keeps_the_state_of_each_and_tells_the_fullest(monkeypatch):
    layers = composed(*SEVEN_B, "hardware.strategy=layers", "hardware.gpus_per_node=4").hardware
    gpus = distributed.list_gpus(layers, torch.device("cuda", 0))
    assert gpus == tuple(torch.device("cuda", number) for number in range(4))
    assert distributed.list_gpus(composed(*SEVEN_B).hardware, torch.device("cuda", 2)) == (torch.device("cuda", 2),)

    states = {gpu: torch.tensor([gpu.index, 7]) for gpu in gpus}
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.get)
    kept = distributed.generator_states(gpus)
    found = {}
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, gpu: found.update({gpu: state}))
    distributed.restore_generators(kept, gpus)
    assert found == states
    with pytest.raises(ValueError, match="shorter"):
        distributed.restore_generators(kept, (*gpus, torch.device("cuda", 4)))

    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda gpu: (gpu.index % 3) * 2**30)
    assert peak_memory_gib(gpus) == 2.0


def test_a_worker_joins_by_nccl_with_the_gpu_that_is_its_own(monkeypatch):
    joined = {}
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: joined.update(device=device))
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda backend, **given: joined.update(given, by=backend)
    )
    monkeypatch.setattr(distributed.dist, "new_group", lambda **given: given)
    patient = distributed.join_workers(on_cpu=False)
    own = torch.device("cuda", 1)
    assert joined == {"device": own, "by": "cpu:gloo,cuda:nccl", "device_id": own}
    assert patient == {"backend": "gloo", "timeout": distributed.PATIENCE}


def test_replicas_do_not_send_each_other_buffers_that_are_alike(monkeypatch):
    made = {}
    monkeypatch.setattr(placement, "DistributedDataParallel", lambda module, **options: made.update(options))
    hardware = composed(*SEVEN_B[:-1], "hardware=4xa100", "hardware.strategy=ddp").hardware
    own = torch.device("cuda", 2)
    placement.place(torch.nn.Identity(), hardware, own, fill_nothing)
    assert made == {"device_ids": [own], "broadcast_buffers": False}


def test_only_changes_that_a_configuration_leaves_are_named():
    config = settle(
        composed(*SEVEN_B, "hardware.micro_batch_size=1", "hardware.activation_checkpointing=full"),
        given(composed(*SEVEN_B), "four A100"),
    )
    assert list_changes(config) == ["stage.sequence_length=1024", "a GPU with more memory"]
    sharded = composed("stage=pretrain", "data=sample", "model=llama2_7b", "hardware=4xa100", "hardware.strategy=ddp")
    assert "hardware.strategy=fsdp" in list_changes(sharded)


def test_other_errors_of_a_run_pass_as_they_are():
    with pytest.raises(RuntimeError, match="shape"), described_when_full(composed(*SEVEN_B), ()):
        raise RuntimeError("shape")


def on_a_card_with(free_gib: float) -> Machine:
    return Machine(gpus=(Gpu(memory_gib=79.2, capability=(8, 0), free_gib=free_gib),), memory_gib=512.0)


def test_a_card_that_others_have_filled_is_refused_before_launch_and_an_empty_one_is_not():
    config = composed(*SEVEN_B)
    met = given(config, "four A100")
    settled = settle(config, met)
    for free_gib, refused in ((2.0, True), (79.0, False), (0.0, False)):
        there = type(met)(machine=on_a_card_with(free_gib), rows=met.rows)
        if refused:
            with pytest.raises(DoesNotFit, match=r"GPU 0 has 2.0 of its 79.2 GiB free, .*CUDA_VISIBLE_DEVICES"):
                check_free_memory(settled, there)
        else:
            check_free_memory(settled, there)


def test_flash_attention_is_not_chosen_for_float32_and_refused_where_it_is_typed():
    config = composed(*SEVEN_B, "hardware.precision=float32")
    assert settle(config, given(config, "four A100")).model.attention is Attention.documents
    bfloat16 = settle(composed(*SEVEN_B), given(config, "four A100"))
    assert bfloat16.hardware.precision is Precision.bfloat16 and bfloat16.model.attention is Attention.flash
    typed = composed(*SEVEN_B, "hardware.precision=float32", "model.attention=flash")
    with pytest.raises(ConfigError, match=r"kernels for 16 bits only and hardware.precision=float32; use model"):
        check_device_support(settle(typed, given(typed, "four A100")))


class PagedAdam(torch.optim.AdamW):
    """AdamW whose buffers are counted, with the names that bitsandbytes gives its states."""

    is_paged = True

    def __init__(self, parameters) -> None:
        super().__init__(parameters)
        self.buffers: list[torch.Tensor] = []

    def get_state_buffer(self, parameter, dtype=torch.float32):
        self.buffers.append(torch.zeros_like(parameter, dtype=dtype))
        return self.buffers[-1]


def test_loaded_states_of_a_paged_optimizer_lie_in_its_paged_buffers_with_their_values():
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = PagedAdam([parameter])
    states = optimizer.state_dict()
    states["state"] = {0: {"step": 3, "state1": torch.arange(8.0), "state2": torch.arange(8.0) ** 2}}
    load_optimizer(optimizer, states)
    held = optimizer.state[parameter]
    assert [held["state1"].data_ptr(), held["state2"].data_ptr()] == [each.data_ptr() for each in optimizer.buffers]
    assert torch.equal(held["state1"], torch.arange(8.0)) and torch.equal(held["state2"], torch.arange(8.0) ** 2)


def test_states_of_an_optimizer_that_does_not_page_are_loaded_as_they_are():
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(8)
    optimizer.step()
    other = torch.optim.AdamW([parameter])
    load_optimizer(other, optimizer.state_dict())
    assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
