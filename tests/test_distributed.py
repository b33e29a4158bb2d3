"""Two gloo workers on a CPU are one process with the same global batch: replicated or sharded, stopped or not."""

import functools
import gc
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import cqlora.model.placement
from cqlora.base import read_base, read_card
from cqlora.data.cache import prepare_cache
from cqlora.data.order import StepOrder
from cqlora.metrics import read_metrics
from cqlora.model.placement import local_part
from tests.runs import (
    adapter_sha256,
    evaluations,
    events,
    extend_tiny,
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
    """Losses, gradient norms, evaluations, the adapter and its card, which says how the base was held, agree."""
    found, expected = ([row for row in read_metrics(each) if row["kind"] == "train"] for each in (folder, reference))
    assert len(found) == len(expected) > 0
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], abs=tolerance), key
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
    for ours, theirs in zip(evaluations(folder), evaluations(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=tolerance)
        assert (ours["source"], ours["tokens"]) == (theirs["source"], theirs["tokens"])
    cards = [read_card(each / "adapter") for each in (folder, reference)]
    assert cards[0] == cards[1]
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
        ("stage.embeddings=full",),
        ("hardware.precision=bfloat16",),
        ("hardware.precision=bfloat16", "stage.embeddings=full"),
    ],
    ids=" ".join,
)
def test_sharding_changes_nothing_whatever_is_trained(overrides, workspace, tmp_path):
    assert finish_workers(typed_run(workspace, *SHORT, *FSDP, *overrides), tmp_path) == [0, 0]
    tolerance = 1e-2 if "hardware.precision=bfloat16" in overrides else 1e-4
    assert_same_numbers(tmp_path, one_process(workspace, *SHORT, *overrides), tolerance)


def tell_memory() -> None:
    """Print what each worker holds: its share of the weights, and all tensors around each block's sharding."""
    check, fully_shard = cqlora.model.placement.check_share, cqlora.model.placement.fully_shard

    def tell_share(share: float, workers: int) -> None:
        print(f"holds {share:.4f} of the weights", file=sys.stderr, flush=True)
        check(share, workers)

    def tell_bytes(module: torch.nn.Module, **options) -> None:
        before = count_live_bytes()
        fully_shard(module, **options)
        print(f"bytes {before} {count_live_bytes()}", file=sys.stderr, flush=True)

    cqlora.model.placement.check_share, cqlora.model.placement.fully_shard = tell_share, tell_bytes


def count_live_bytes() -> int:
    """Memory of every tensor that this process still has."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and not isinstance(each, DTensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def assert_half_is_held(told: str) -> None:
    """Two workers hold half the weights each, and from block to block as little as that."""
    assert 0.49 < float(re.search(r"holds ([\d.]+) of the weights", told)[1]) < 0.51
    live = [(int(before), int(after)) for before, after in re.findall(r"bytes (\d+) (\d+)", told)]
    blocks = live[:-1]
    assert len(blocks) == 2
    # The second block: what it brought, and what of it, and of its adapter, went to the other worker.
    brought, left = blocks[1][0] - blocks[0][1], blocks[1][1] - blocks[0][1]
    assert left < 0.5 * brought


@pytest.mark.parametrize("layout", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_killed_and_resumed_with_dropout_two_workers_give_the_same_bits(layout, workspace, tmp_path):
    overrides = ("lora.dropout=0.1", "stage.max_steps=9", "stage.checkpoint_every_steps=3")
    config = typed_run(workspace, *RUN, *overrides, *layout)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert finish_workers(config, whole, tell_memory) == [0, 0]
    children = start_workers(config, stopped)
    wait_for_step(children[0], stopped, 5)
    kill(children[1])
    # Nobody watches these two: the connection's end alone must end the other.
    children[0].join(timeout=30)
    assert children[0].exitcode == 1
    assert finish_workers(config, stopped) == [0, 0]
    assert events(stopped)[-2:] == ["checkpoint", "checkpoint"] and "resumed" in events(stopped)
    assert losses(stopped) == losses(whole)
    assert adapter_sha256(stopped) == adapter_sha256(whole)
    assert_adapter_is_whole(config.model.path, whole)
    for told in whole.glob("stderr*.txt") if layout is FSDP else []:
        assert_half_is_held(told.read_text())


def assert_adapter_is_whole(base: str, folder: Path) -> None:
    """The saved adapter is plain PEFT, of the shapes of a single process's, and the one that was evaluated last."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(model, folder / "adapter")
    loaded = {name: tensor for name, tensor in adapted.state_dict().items() if "lora_" in name}
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(loaded)
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, loaded[name.replace(".weight", ".default.weight")], atol=0, rtol=0)
    assert all(float(tensor.abs().max()) > 0 for tensor in saved.values())


def plant_nan_on_one_worker_at_step_2() -> None:
    """One number of one worker's gradient is not finite; with replication, every worker has the same gradient."""
    original = torch.nn.utils.clip_grad_norm_
    calls = []

    def clip(parameters, *arguments, **options):
        calls.append(1)
        sharded = isinstance(parameters[0], DTensor)
        if len(calls) == 2 and (os.environ["RANK"] == "1" or not sharded):
            local_part(parameters[0].grad).view(-1)[0] = float("nan")
        return original(parameters, *arguments, **options)

    torch.nn.utils.clip_grad_norm_ = clip


@pytest.mark.parametrize("layout", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_what_is_not_finite_on_one_worker_is_skipped_by_all(layout, workspace, tmp_path):
    config = typed_run(workspace, *SHORT, *layout)
    assert finish_workers(config, tmp_path, plant_nan_on_one_worker_at_step_2) == [0, 0]
    assert events(tmp_path).count("skipped_step") == 1
    assert [step for step, _ in losses(tmp_path)] == [1, 3]


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_of_an_extended_base_train_sharded_as_in_one_process(tied, workspace, tmp_path):
    base = extend_tiny(workspace, tmp_path, tied)
    overrides = (f"model.path={base}", f"model.tie_word_embeddings={tied}")
    assert finish_run(typed_run(workspace, *SHORT, *overrides), tmp_path / "one") == 0
    assert finish_workers(typed_run(workspace, *SHORT, *overrides, *FSDP), tmp_path / "two") == [0, 0]
    assert_same_numbers(tmp_path / "two", tmp_path / "one", 1e-4)
    if tied:
        return
    # A sharded run goes on from an adapter, with its rows, as one process does.
    more = (*overrides, f"stage.init_adapter={tmp_path / 'one' / 'adapter'}", "stage.max_steps=2")
    assert finish_run(typed_run(workspace, *SHORT, *more), tmp_path / "one-more") == 0
    assert finish_workers(typed_run(workspace, *SHORT, *more, *FSDP), tmp_path / "two-more") == [0, 0]
    assert_same_numbers(tmp_path / "two-more", tmp_path / "one-more", 1e-4)
