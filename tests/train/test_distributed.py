"""Two gloo workers on a CPU are one process with the same global batch: replicated or sharded, stopped or not."""

import functools
import gc
import hashlib
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

import cqlora.model.placement
from cqlora.base import read_base, read_card
from cqlora.data.cache import prepare_cache
from cqlora.data.order import StepOrder
from cqlora.model.placement import local_part
from cqlora.system.metrics import read_metrics
from cqlora.train.trainer import Trainer
from tests.runs import (
    adapter_sha256,
    build_once,
    evaluations,
    events,
    extend_tiny,
    finish_run,
    finish_workers,
    losses,
    typed_run,
)

STEPS = 6
BATCH = 8
RUN = (
    "stage=pretrain",
    "lora.dropout=0",
    f"stage.global_batch_size={BATCH}",
    "stage.learning_rate=1e-2",
    "data.sources.sample_zh.sample=11",
    "data.sources.sample_en.sample=11",
)
"""41 packs: the sixth step has one pack left, and so none for the second worker."""
LONG = (*RUN, f"stage.max_steps={STEPS}")
SHORT = (*RUN, "stage.max_steps=3")
DDP = ("hardware.processes_per_node=2", "hardware.strategy=ddp")
FSDP = ("hardware.processes_per_node=2", "hardware.strategy=fsdp")

OF_THE_WEIGHTS = {"adapter_sha256", "card_sha256"}
"""What a card says of the weights beside it: two layouts round the last bit of a gradient differently."""
GRADIENT_BOUND = 1e-6
"""How far any entry of a gradient may be from the other's, as a share of the gradient's norm. From the same parameters,
two layouts differ by the order in which the packs' float32 gradients are added alone: 6e-8 a sum, on any processor;
3e-8 was the most on one with AVX2. What is lost or counted twice of a worker is of the size of the norm."""
UPDATE_BOUND = 1e-4
"""How far an update may be from the other's, as a share of its norm. AdamW divides a gradient by its own size, so an
entry whose gradient is rounding alone may go either way: few are, and 1e-6 was the most with AVX2."""


def one_process(workspace: Path, *overrides: str) -> Path:
    """A finished run of one process with what each step began from, shared by the tests that compare with it."""
    name = hashlib.sha256(repr(overrides).encode()).hexdigest()[:16]

    def train(folder: Path) -> None:
        assert finish_run(typed_run(workspace, *overrides), folder, functools.partial(record_steps, folder)) == 0

    return build_once(workspace / f"one-process-{name}", train)


def record_steps(folder: Path, reference: Path | None = None) -> None:
    """Keep the parameters that each step begins from and the gradients that it finds.

    With a `reference`, each step begins from that run's parameters: what is compared is one step of two layouts and
    not what a rate of 1e-2 makes of the last bit in twenty.
    """
    original = Trainer.accumulate
    (folder / "steps").mkdir(parents=True, exist_ok=True)

    def accumulate(self: Trainer, *arguments):
        name = f"steps/{self.counters.step}.pt"
        before = [whole(parameter).clone() for parameter in self._trainable]
        if reference is not None:
            for parameter, value in zip(self._trainable, torch.load(reference / name)["before"], strict=True):
                put(parameter, value)
        result = original(self, *arguments)
        gradients = [whole(parameter.grad) for parameter in self._trainable]
        if self.worker.is_main:
            torch.save({"before": before, "gradients": gradients}, folder / name)
        return result

    Trainer.accumulate = accumulate


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered from all workers if it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give a parameter, sharded or not, the values of a whole tensor."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements).to_local()
    with torch.no_grad():
        local_part(parameter).copy_(value)


def assert_same_steps(folder: Path, reference: Path, gradient_bound: float, update_bound: float) -> None:
    """Each step's gradients from the same parameters agree, and so does what the optimizer makes of them."""
    steps = [
        [torch.load(each / "steps" / f"{n}.pt") for n in range(len(losses(reference)))] for each in (folder, reference)
    ]
    for number, (ours, theirs) in enumerate(zip(*steps, strict=True)):
        norm = norm_of(theirs["gradients"])
        for found, expected in zip(ours["gradients"], theirs["gradients"], strict=True):
            assert float((found - expected).abs().max()) <= gradient_bound * norm, f"step {number + 1}"
        if number:
            update = norm_of(minus(theirs["before"], steps[1][number - 1]["before"]))
            assert norm_of(minus(ours["before"], theirs["before"])) <= update_bound * update, f"step {number}"


def minus(ones: list[torch.Tensor], others: list[torch.Tensor]) -> list[torch.Tensor]:
    return [one - other for one, other in zip(ones, others, strict=True)]


def norm_of(tensors: list[torch.Tensor]) -> float:
    return float(torch.stack([tensor.float().norm() for tensor in tensors]).norm())


def assert_same_run(
    folder: Path, reference: Path, gradient_bound: float = GRADIENT_BOUND, update_bound: float = UPDATE_BOUND
) -> None:
    """Steps, losses, gradient norms, evaluations and the adapter agree."""
    assert_same_steps(folder, reference, gradient_bound, update_bound)
    found, expected = ([row for row in read_metrics(each) if row["kind"] == "train"] for each in (folder, reference))
    assert len(found) == len(expected) > 0
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=10 * gradient_bound), (
            key
        )
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
    for ours, theirs in zip(evaluations(folder), evaluations(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=max(1e-4, gradient_bound))
        assert (ours["source"], ours["tokens"]) == (theirs["source"], theirs["tokens"])
    cards = [read_card(each / "adapter") for each in (folder, reference)]
    cards = [{key: value for key, value in card.items() if key not in OF_THE_WEIGHTS} for card in cards]
    assert cards[0] == cards[1] and "trained_on" in cards[0]
    adapters = [load_file(each / "adapter" / "adapter_model.safetensors") for each in (folder, reference)]
    assert adapters[0].keys() == adapters[1].keys()
    # They begin their last step as one, and no entry moves further in a step than the learning rate.
    apart = norm_of([tensor.float() - adapters[1][name].float() for name, tensor in adapters[0].items()])
    assert apart <= update_bound * norm_of(list(adapters[1].values()))


def test_the_compared_run_learns_and_ends_with_a_step_that_leaves_a_worker_without_a_pack(workspace):
    config = typed_run(workspace, *LONG)
    taken = losses(one_process(workspace, *LONG))
    order = StepOrder(len(prepare_cache(config, read_base(config.model.path)).splits["train"]), BATCH, config.seed)
    assert [len(order.packs_of_step(step)) for step in range(STEPS)] == [BATCH] * (STEPS - 1) + [1]
    # By a thousand times what two workers may differ by.
    assert taken[-2][1] < taken[0][1] * (1 - 1000 * GRADIENT_BOUND)


@pytest.mark.parametrize("layout", [DDP, FSDP, (*FSDP, "hardware.cpu_offload=true")], ids=["ddp", "fsdp", "offload"])
def test_two_workers_are_one_process_with_the_same_global_batch(layout, workspace, tmp_path):
    reference = one_process(workspace, *LONG)
    config = typed_run(workspace, *LONG, *layout)
    assert finish_workers(config, tmp_path, functools.partial(record_steps, tmp_path, reference)) == [0, 0]
    assert_same_run(tmp_path, reference)


@pytest.mark.parametrize(
    "overrides, bounds",
    [
        # Its moments have eight bits: one that is rounded the other way is a sixteenth of itself off.
        (("stage.optimizer=adamw_8bit",), (GRADIENT_BOUND, 1e-2)),
        (("stage.embeddings=full",), (GRADIENT_BOUND, UPDATE_BOUND)),
        (("lora.b_learning_rate_ratio=4", "stage.learning_rate=1e-3"), (GRADIENT_BOUND, UPDATE_BOUND)),
        # Products have eight bits, of the same packs one by one in both.
        (("hardware.precision=bfloat16",), (1e-4, 1e-2)),
        (("hardware.precision=bfloat16", "stage.embeddings=full"), (1e-4, 1e-2)),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
def test_sharding_changes_nothing_whatever_is_trained(overrides, bounds, workspace, tmp_path):
    reference = one_process(workspace, *SHORT, *overrides)
    config = typed_run(workspace, *SHORT, *FSDP, *overrides)
    assert finish_workers(config, tmp_path, functools.partial(record_steps, tmp_path, reference)) == [0, 0]
    assert_same_run(tmp_path, reference, *bounds)


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


def assert_half_is_held(log: str) -> None:
    """Two workers hold half the weights each, and from block to block as little as that."""
    assert 0.49 < float(re.search(r"holds ([\d.]+) of the weights", log)[1]) < 0.51
    live = [(int(before), int(after)) for before, after in re.findall(r"bytes (\d+) (\d+)", log)]
    blocks = live[:-1]
    assert len(blocks) == 2
    # The second block: what it brought, and what of it, and of its adapter, went to the other worker.
    brought, left = blocks[1][0] - blocks[0][1], blocks[1][1] - blocks[0][1]
    assert left < 0.5 * brought


def test_two_nodes_of_two_workers_each_hold_a_model_and_are_one_process(workspace, tmp_path):
    """Sharded within a node, replicated across: four workers, of whom each holds half."""
    nodes = ("hardware.nodes=2", *FSDP)
    reference = one_process(workspace, *SHORT)
    config = typed_run(workspace, *SHORT, *nodes)
    assert finish_workers(config, tmp_path, functools.partial(record_steps_and_memory, tmp_path, reference)) == [0] * 4
    assert_same_run(tmp_path, reference)
    assert_adapter_is_whole(config.model.path, tmp_path)
    logs = sorted(tmp_path.glob("stderr*.txt"))
    assert len(logs) == 4
    for log in logs:
        assert_half_is_held(log.read_text())


def record_steps_and_memory(folder: Path, reference: Path) -> None:
    record_steps(folder, reference)
    tell_memory()


def die_in_step_4_on_rank_1() -> None:
    """kill -9 of one worker while the other waits for it."""
    original = Trainer.accumulate

    def accumulate(self: Trainer, *arguments):
        if self.counters.step == 3 and self.worker.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    Trainer.accumulate = accumulate


@pytest.mark.parametrize("layout", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_killed_and_resumed_with_dropout_noise_and_two_rates_two_workers_give_the_same_bits(
    layout, workspace, tmp_path
):
    overrides = ("lora.dropout=0.1", "stage.max_steps=5", "stage.checkpoint_every_steps=2")
    levers = ("stage.neftune_alpha=5", "lora.b_learning_rate_ratio=4", "stage.learning_rate=1e-3")
    config = typed_run(workspace, *RUN, *overrides, *levers, *layout)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert finish_workers(config, whole, tell_memory) == [0, 0]
    # Nobody watches these two: the connection's end alone must end the other.
    assert finish_workers(config, stopped, die_in_step_4_on_rank_1) == [1, -signal.SIGKILL]
    assert finish_workers(config, stopped) == [0, 0]
    assert events(stopped)[-2:] == ["checkpoint", "checkpoint"] and "resumed" in events(stopped)
    assert losses(stopped) == losses(whole)
    assert adapter_sha256(stopped) == adapter_sha256(whole)
    assert_adapter_is_whole(config.model.path, whole)
    for log in whole.glob("stderr*.txt") if layout is FSDP else []:
        assert_half_is_held(log.read_text())


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
    assert_sharded_is_one(workspace, tmp_path / "rows", *SHORT, *overrides)
    if tied:
        return
    # A sharded run goes on from an adapter, with its rows, as one process does.
    adapter = tmp_path / "rows-one" / "adapter"
    assert_sharded_is_one(workspace, tmp_path / "more", *SHORT, *overrides, f"stage.init_adapter={adapter}")


def assert_sharded_is_one(workspace: Path, folder: Path, *overrides: str) -> None:
    """Train in one process into `folder-one` and sharded into `folder`; both are one run."""
    one = folder.with_name(f"{folder.name}-one")
    assert finish_run(typed_run(workspace, *overrides), one, functools.partial(record_steps, one)) == 0
    config = typed_run(workspace, *overrides, *FSDP)
    assert finish_workers(config, folder, functools.partial(record_steps, folder, one)) == [0, 0]
    # A row that few tokens meet has a gradient near nothing, which AdamW takes to full size.
    assert_same_run(folder, one, 10 * GRADIENT_BOUND, 100 * UPDATE_BOUND)
