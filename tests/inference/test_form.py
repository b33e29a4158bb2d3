"""The form is the fastest that the processor has and the memory holds, or as asked for, or an error with numbers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cqlora.errors import ConfigError, ModelError
from cqlora.inference.architecture import Architecture
from cqlora.inference.form import Layout, choose_form, needed_bytes

SEVEN_B = Architecture(
    layers=32, hidden=4096, intermediate=11008, heads=32, key_value_heads=32, head_dim=128, vocab_size=32000,
    tied=False, epsilon=1e-6, max_length=4096, rope={"rope_type": "default", "rope_theta": 10_000.0},
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """A processor and its free memory."""

    def set_up(gib: float, bfloat16: bool = True, fused: bool = True) -> None:
        memory = SimpleNamespace(available=gib * (1 << 30))
        monkeypatch.setattr("cqlora.inference.form.psutil.virtual_memory", lambda: memory)
        monkeypatch.setattr("cqlora.inference.form.suits_bfloat16_matrices", lambda: bfloat16)
        monkeypatch.setattr("cqlora.inference.form.has_fused_nf4", lambda: fused)

    return set_up


def choose(quantised: bool, dtype: str = "auto", device: torch.device = CPU):
    form = choose_form(SEVEN_B, quantised, dtype, device, Path("model"))
    return form.layout, form.dtype


def test_memory_of_a_7b_model_is_that_of_its_6_7_billion_numbers(machine):
    machine(gib=100)
    numbers = 6_738_149_376  # all of LLaMA 7B's but its norms
    assert needed_bytes(SEVEN_B, choose_form(SEVEN_B, False, "float32", CPU, Path("model"))) == 4 * numbers
    assert needed_bytes(SEVEN_B, choose_form(SEVEN_B, True, "auto", CPU, Path("model"))) < 4.1e9


def test_nf4_stays_where_the_fused_kernel_is_and_is_unpacked_once_elsewhere(machine):
    machine(gib=100)
    assert choose(True) == (Layout.fused_nf4, torch.bfloat16)
    assert choose(False) == (Layout.dense, torch.bfloat16)
    machine(gib=100, fused=False)
    assert choose(True) == (Layout.dense, torch.bfloat16)
    machine(gib=100, fused=False, bfloat16=False)
    assert choose(True) == (Layout.dense, torch.float32)
    assert str(choose_form(SEVEN_B, True, "auto", CPU, Path("model"))) == "NF4 numbers unpacked to float32 on cpu"
    assert str(choose_form(SEVEN_B, False, "auto", CPU, Path("model"))) == "matrices in float32 on cpu"


def test_less_memory_takes_the_smaller_type_and_too_little_is_reported(machine):
    machine(gib=20, fused=False, bfloat16=False)
    assert choose(False) == (Layout.dense, torch.bfloat16)
    machine(gib=5, fused=False)
    with pytest.raises(ModelError, match=r"takes 12\.6 GiB and 5\.0 GiB of memory are free"):
        choose(False)
    machine(gib=5)
    assert choose(True) == (Layout.fused_nf4, torch.bfloat16)


def test_a_type_that_is_asked_for_is_taken_and_another_is_refused(machine):
    machine(gib=100)
    assert choose(True, "float32") == (Layout.dense, torch.float32)
    assert choose(False, "bfloat16") == (Layout.dense, torch.bfloat16)
    with pytest.raises(ConfigError, match="dtype=int3"):
        choose(False, "int3")


def test_nf4_is_unpacked_on_a_gpu(machine, monkeypatch):
    machine(gib=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose(True, device=torch.device("cuda")) == (Layout.dense, torch.bfloat16)
    assert choose(False, device=torch.device("cuda")) == (Layout.dense, torch.bfloat16)
