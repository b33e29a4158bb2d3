"""A native call that is wrong, or kills its process, is never made: the engine goes the plain way and says so once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cqlora.inference.kernel as kernel
import cqlora.inference.linear as linear
from cqlora.inference import checks, proof
from cqlora.inference.form import Form, Layout
from cqlora.inference.linear import Dense, pack_dense
from cqlora.inference.opening import Request, open_decoder

CPU = torch.device("cpu")
FAILURES = {
    "gives_wrong_numbers": "failed its check (a product of 1 rows is off by 10% of its size)",
    "kills_its_process": "ended the process that checked it (SIGSEGV)",
}


@pytest.fixture(autouse=True)
def _nothing_proven_yet():
    proof.is_proven.cache_clear()
    yield
    proof.is_proven.cache_clear()


def call_of(check: str) -> proof.NativeCall:
    return proof.NativeCall("The call", "torch", f"tests.inference.native:{check}")


@pytest.mark.parametrize("check", FAILURES)
def test_a_wrong_or_deadly_nf4_product_leads_to_unpacked_matrices_and_one_line(
    check, base, nf4_adapter, monkeypatch, caplog
):
    monkeypatch.setattr(kernel, "FUSED_NF4", replace(kernel.FUSED_NF4, check=call_of(check).check))
    monkeypatch.setattr(kernel, "_load_product", lambda: pytest.fail)
    monkeypatch.setattr(kernel, "may_fuse_nf4", lambda: True)
    for _ in range(2):
        _, form = open_decoder(Request(nf4_adapter, base, "auto", "auto", cache=False, device=CPU))
        assert form == Form(Layout.dense, form.dtype, CPU, unpacked=True)
    (line,) = [each.getMessage() for each in caplog.records if "fused NF4" in each.getMessage()]
    assert line.startswith("bitsandbytes' fused NF4 product ") and line.endswith("computes without it, more slowly.")


@pytest.mark.parametrize("check", FAILURES)
def test_a_wrong_or_deadly_packed_product_leaves_matrices_as_they_are_with_one_line(check, monkeypatch, caplog):
    monkeypatch.setattr(linear, "PACKED", call_of(check))
    monkeypatch.setattr(linear, "packs_bfloat16", lambda: True)
    dense = Dense(torch.randn(32, 32).bfloat16())
    assert pack_dense(dense) is dense and pack_dense(dense) is dense
    assert len(caplog.records) == 1


@pytest.mark.parametrize("check, told", FAILURES.items())
def test_what_went_wrong_is_told_and_never_remembered_as_right(check, told, caplog):
    for _ in range(2):
        assert not proof.is_proven(call_of(check))
        proof.is_proven.cache_clear()
    assert [each.getMessage() for each in caplog.records] == [
        f"The call {told}; the engine computes without it, more slowly."
    ] * 2


def test_a_proof_costs_one_process_for_each_version_and_processor(monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(proof, "find_failure", lambda call: asked.append(call) or "")
    call = call_of("is_right")

    def prove() -> int:
        proof.is_proven.cache_clear()
        assert proof.is_proven(call)
        return len(asked)

    assert prove() == prove() == 1
    monkeypatch.setattr(proof, "version", lambda package: "99.0")
    assert prove() == prove() == 2
    monkeypatch.setattr(proof, "describe_processor", lambda: ["another"])
    assert prove() == prove() == 3
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2_VNNI")
    assert prove() == prove() == 4
    assert not caplog.records


def test_a_cache_folder_that_cannot_be_written_costs_the_check_again_and_nothing_else(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert proof.is_proven(call_of("is_right")) and not caplog.records


def test_checks_are_run_in_the_folder_of_no_other_program(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    assert proof.find_failure(call_of("is_right")) == ""


@pytest.mark.parametrize("call", [kernel.FUSED_NF4, linear.PACKED], ids=lambda call: call.package)
def test_the_checks_that_calls_name_are_there(call):
    module, _, function = call.check.partition(":")
    assert module == checks.__name__ and callable(getattr(checks, function))
    assert Path(checks.__file__).is_relative_to(proof._ROOT)


def test_the_real_calls_pass_their_checks_where_the_processor_has_them():
    if not kernel.has_fused_nf4():
        pytest.skip("this processor or bitsandbytes has no fused NF4 product")
    checks.check_fused_nf4()
    checks.check_packed()
    assert proof.is_proven(linear.PACKED)
