"""What the processor has, hidden or taken to be there: every place that chooses by it follows one switch."""

from pathlib import Path

import pytest
import torch

import cqlora.system.processor as processor
from cqlora.config.choices import Device, Precision
from cqlora.errors import ConfigError
from cqlora.inference.form import Layout, choose_form
from cqlora.inference.kernel import find_fused_nf4
from cqlora.inference.linear import Dense, pack_dense
from cqlora.launch.settle import choose_precision
from cqlora.model.load import COMPUTE_DTYPES
from cqlora.system.machine import probe_machine
from tests.inference.test_form import SEVEN_B
from tests.processors import name_others

CPU = torch.device("cpu")
PACKAGE = Path(processor.__file__).parent.parent


@pytest.fixture
def set_features(monkeypatch):
    """Sets the switch, and hides the variables by which torch and oneDNN are told."""

    def set_to(name: str) -> None:
        monkeypatch.setenv(processor.SWITCH, name)

    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    return set_to


@pytest.mark.parametrize("features, precision", [("plain", Precision.float32), ("bfloat16", Precision.bfloat16)])
def test_training_plan_and_engine_follow_the_switch(features, precision, set_features, monkeypatch):
    monkeypatch.setattr("cqlora.inference.form.needed_bytes", lambda architecture, form: 0)
    set_features(features)
    assert choose_precision(Device.cpu, probe_machine(look_for_gpus=False)) is precision
    assert find_fused_nf4() is None
    for quantised in (True, False):
        form = choose_form(SEVEN_B, quantised, "auto", CPU, Path("model"))
        assert (form.layout, form.dtype) == (Layout.dense, COMPUTE_DTYPES[precision])


def test_no_matrix_is_packed_where_the_processor_is_taken_to_be_plain(set_features, monkeypatch):
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: True)
    set_features("plain")
    dense = Dense(torch.randn(32, 32).bfloat16())
    assert pack_dense(dense) is dense
    set_features("all")
    assert processor.packs_bfloat16()


@pytest.mark.parametrize(
    "flags, isa, expected",
    [
        ("fpu avx2 fma", "", False),
        ("fpu avx2 avx512f avx512bw", "", False),
        ("fpu avx512_bf16", "", True),
        ("fpu amx_bf16 amx_tile", "", True),
        ("fpu amx_bf16 amx_tile", "AVX2", False),
        ("fpu amx_bf16 amx_tile", "avx512_core", False),
        ("fpu amx_bf16 amx_tile", "AVX512_CORE_BF16", True),
    ],
)
def test_bfloat16_suits_where_units_multiply_it_and_onednn_may_use_them(
    flags, isa, expected, set_features, monkeypatch
):
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(processor, "_has_units", processor._has_units.__wrapped__)
    set_features("all")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert processor.suits_bfloat16() is expected


def test_a_name_that_is_none_is_reported_with_those_that_are(set_features):
    set_features("avx512")
    with pytest.raises(ConfigError) as caught:
        processor.suits_bfloat16()
    assert str(caught.value) == ("CQLORA_CPU_FEATURES=avx512 is unknown; use one of all, plain, bfloat16, or unset it.")


def test_nobody_else_asks_what_the_processor_has():
    questions = ("_is_mkldnn_bf16_supported", "/proc/cpuinfo", "_is_avx512", "_is_amx", "get_cpu_capability")
    asking = {file.name for file in PACKAGE.rglob("*.py") if any(each in file.read_text("utf-8") for each in questions)}
    assert asking == {"processor.py"}


def test_make_runs_the_tests_as_on_every_kind_of_processor_that_this_one_is_not():
    assert name_others(suits=True, packs=True) == ["plain"]
    assert name_others(suits=False, packs=True) == ["plain", "bfloat16"]
    assert name_others(suits=False, packs=False) == ["bfloat16"]
