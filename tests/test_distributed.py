"""Two gloo workers on a CPU are one process with the same global batch: replicated or sharded, stopped or not."""

import functools
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cqlora.model.load
import cqlora.model.placement
from cqlora.base import read_base
from cqlora.data.cache import prepare_cache
from cqlora.data.order import StepOrder
from cqlora.metrics import read_metrics
from tests.runs import (
    adapter_sha256,
    evaluations,
    events,
    finish_run,
    finish_workers,
    kill,
    losses,
    start_workers,
    typed_run,
    wait_for_step,
)

STEPS = 20
BATCH = 8
RUN = (
    "stage=pretrain",
    "lora.dropout=0",
    f"stage.global_batch_size={BATCH}",
    "stage.learning_rate=1e-2",
    "data.sources.sample_zh.sample=41",
    "data.sources.sample_en.sample=41",
)
"""153 packs: the twentieth step has one pack left, and so none for the second worker."""
LONG = (*RUN, f"stage.max_steps={STEPS}")
SHORT = (*RUN, "stage.max_steps=3")
DDP = ("hardware.processes_per_node=2", "hardware.strategy=ddp")
FSDP = ("hardware.processes_per_node=2", "hardware.strategy=fsdp")


@functools.cache
def one_process(workspace: Path, *overrides: str) -> Path:
    """A finished run of one process, shared by the tests that compare with it."""
    folder = workspace / f"one-process-{abs(hash(overrides))}"
    assert finish_run(typed_run(workspace, *overrides), folder) == 0
    return folder


def assert_same_numbers(folder: Path, reference: Path, tolerance: float) -> None:
    """Losses, gradient norms, evaluations and the adapter agree."""
    found, expected = (
        [row for row in read_metrics(each) if row["kind"] == "train"] for each in (folder, reference)
    )
    assert len(found) == len(expected) > 0
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], abs=tolerance), key
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
    for ours, theirs in zip(evaluations(folder), evaluations(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=tolerance)
        assert (ours["source"], ours["tokens"]) == (theirs["source"], theirs["tokens"])
    adapters = [load_file(each / "adapter" / "adapter_model.safetensors") for each in (folder, reference)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], atol=100 * tolerance, rtol=0, msg=name)


def test_the_compared_run_learns_and_ends_with_a_step_that_leaves_a_worker_without_a_pack(workspace):
    config = typed_run(workspace, *LONG)
    taken = losses(one_process(workspace, *LONG))
    order = StepOrder(len(prepare_cache(config, read_base(config.model.path)).splits["train"]), BATCH, config.seed)
    assert [len(order.packs_of_step(step)) for step in range(STEPS)] == [BATCH] * (STEPS - 1) + [1]
    # By 500 times what two workers may differ by.
    assert taken[-2][1] < taken[0][1] - 0.05


@pytest.mark.parametrize("layout", [DDP, FSDP, (*FSDP, "hardware.cpu_offload=true")], ids=["ddp", "fsdp", "offload"])
def test_two_workers_are_one_process_with_the_same_global_batch(layout, workspace, tmp_path):
    assert finish_workers(typed_run(workspace, *LONG, *layout), tmp_path) == [0, 0]
    assert_same_numbers(tmp_path, one_process(workspace, *LONG), 1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ("stage.optimizer=adamw_8bit",),
        ("stage.embeddings=lora",),
        ("stage.embeddings=full",),
        ("model.quantization=none",),
        ("hardware.precision=bfloat16",),
    ],
    ids=lambda overrides: overrides[0],
)
def test_sharding_changes_nothing_whatever_is_trained(overrides, workspace, tmp_path):
    assert finish_workers(typed_run(workspace, *SHORT, *FSDP, *overrides), tmp_path) == [0, 0]
    tolerance = 1e-2 if overrides == ("hardware.precision=bfloat16",) else 1e-4
    assert_same_numbers(tmp_path, one_process(workspace, *SHORT, *overrides), tolerance)
