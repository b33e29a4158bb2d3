"""The closed form of one worker's memory."""

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch

from cqlora.config.choices import Checkpointing, Quantization, Strategy
from cqlora.config.schema import LoraConfig
from cqlora.model.loss import CHUNK_TOKENS
from cqlora.plan.activations import backward_per_token, kept_per_token
from cqlora.plan.estimate import GIB, estimate, packed_bytes, trainable_parameters
from cqlora.plan.memory import plan_memory
from cqlora.plan.program import Program
from cqlora.plan.shapes import adapter_parameters
from cqlora.plan.workload import Rows, Workload, describe_run
from tests.plan.runs import compose_run, small_model


def llama_65b(**changes: object) -> Workload:
    """Rank 64 on all linear layers, two packs of 2,048 tokens."""
    model = compose_run("stage=pretrain", "model=llama_65b").model
    work = Workload(model=model, lora=LoraConfig(rank=64), tokens=4096, pack_tokens=2048)
    return replace(work, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("double", [True, False])
def test_packed_bytes_are_those_of_bitsandbytes(double: bool) -> None:
    weight = torch.randn(1024, 2048)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    constants = [state.absmax] + ([state.state2.absmax] if double else [])
    work = Workload(model=small_model(double_quantization=double), tokens=1, pack_tokens=1)
    planned, planned_constants = packed_bytes(work, weight.numel())
    assert planned == packed.numel() * packed.element_size()
    assert planned_constants == sum(t.numel() * t.element_size() for t in constants)


def test_65b_sharded_over_four_gpus_takes_21_to_25_gib_and_replicated_more_than_40() -> None:
    sharded = estimate(llama_65b(strategy=Strategy.fsdp, workers=4))
    assert 21 < sharded.step / GIB < 25
    assert estimate(llama_65b(strategy=Strategy.ddp, workers=4)).step / GIB > 40


def test_sharding_over_n_gpus_leaves_each_an_nth_of_weights_and_states() -> None:
    alone, of_four = estimate(llama_65b()), estimate(llama_65b(strategy=Strategy.fsdp, workers=4))
    assert of_four.adapter == alone.adapter / 4
    assert of_four.optimizer == alone.optimizer / 4
    # The quantisation constants stay whole.
    assert alone.weights / 4 < of_four.weights < alone.weights / 4 + 1.1 * GIB


def test_over_several_nodes_a_gpu_holds_what_it_would_of_one() -> None:
    config = compose_run(
        "stage=pretrain", "data=sample", "model=llama_65b", "hardware=2x8xh100", "hardware.strategy=fsdp"
    )
    of_one = compose_run(
        "stage=pretrain", "data=sample", "model=llama_65b", "hardware=8xh100", "hardware.strategy=fsdp"
    )
    assert describe_run(config).shards == describe_run(of_one).shards == 8
    assert plan_memory(config).worker.weights == plan_memory(of_one).worker.weights
    apart = replace(config, hardware=replace(config.hardware, processes_per_node=1))
    assert describe_run(apart).shards == 2


@pytest.mark.parametrize("rank, share", [(4, 1.0), (16, 720_896 / 1_249_280), (64, 0.0)])
def test_paged_states_of_small_matrices_stay_on_the_device(rank: int, share: float) -> None:
    # Of rank 16 on 7B, 11 matrices of a block have 65,536 numbers and 3 have 176,128.
    options = ("stage=pretrain", "data=sample", "model=llama_7b", "hardware=1x4090", f"lora.rank={rank}")
    paged = compose_run(*options, "stage.optimizer=paged_adamw")
    adapter = trainable_parameters(describe_run(paged))
    assert plan_memory(paged).worker.optimizer == pytest.approx(8 * share * adapter)


def test_full_checkpointing_keeps_one_input_a_block_and_one_block() -> None:
    full = estimate(llama_65b(checkpointing=Checkpointing.full))
    none = estimate(llama_65b(checkpointing=Checkpointing.none))
    inputs = 4096 * 8192 * 2 * 80
    assert inputs < full.activations < none.activations / 5
    assert full.activations - inputs == pytest.approx(none.activations / 80, rel=0.5)


def test_logits_are_never_more_than_a_chunk() -> None:
    wide = replace(llama_65b().model, vocab_size=10**6)
    whole = estimate(llama_65b(model=wide, program=Program(chunk_tokens=0)))
    assert whole.moment == "loss"
    assert whole.logits == 4096 * 10**6 * 6
    assert estimate(llama_65b(model=wide)).logits <= 512 * 10**6 * 6


@pytest.mark.parametrize("hardware", ["1xa100", "cpu"])
def test_a_chunk_is_the_loss_s_own(hardware: str) -> None:
    config = compose_run("stage=pretrain", f"hardware={hardware}")
    assert describe_run(config).program.chunk_tokens == CHUNK_TOKENS[config.hardware.device.name]


def test_kernels_keep_what_a_norm_reads_as_it_is_and_one_call_the_output_once() -> None:
    seven_b = ("stage=pretrain", "model=llama_7b", "hardware=1xa100", "hardware.activation_checkpointing=none")
    own, plain = (
        describe_run(compose_run(*seven_b, *more))
        for more in ([], ["hardware.kernels=plain", "model.attention=documents"])
    )
    kept = [kept_per_token(work.model, work.lora, work.program) for work in (own, plain)]
    two_norms_and_the_output = 2 * 4096 * (2 + 1)
    assert kept[1] - kept[0] == two_norms_and_the_output
    passing = [backward_per_token(work.model, work.program) for work in (own, plain)]
    assert passing[1] - passing[0] == 2 * own.model.intermediate_size


@pytest.mark.parametrize(
    "hardware, copies",
    [
        ("1xa100", 1),
        ("8xa100 hardware.strategy=fsdp", 0),
        ("1xa100 hardware.precision=float32", 0),
        ("2xcpu hardware.precision=float32", 0),
    ],
)
def test_a_whole_adapter_in_16_bits_lasts_a_step_unless_it_is_sharded(hardware: str, copies: int) -> None:
    more = ["model.quantization=nf4", "lora.rank=64", "model=llama_7b", "hardware.activation_checkpointing=full"]
    work = describe_run(compose_run("stage=pretrain", *f"hardware={hardware}".split(), *more))
    lasting = 2 * adapter_parameters(work.model, work.lora)
    without = estimate(replace(work, program=replace(work.program, holds_casts=False))).buffers
    assert estimate(work).buffers == pytest.approx(without + copies * lasting)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 8192},
        {"lora": LoraConfig(rank=128)},
        {"checkpointing": Checkpointing.none},
        {"trained_embedding": 50_000_000},
    ],
)
def test_more_of_anything_takes_more(change: dict[str, object]) -> None:
    assert estimate(llama_65b(**change)).peak > estimate(llama_65b()).peak


def test_layers_spread_over_gpus_take_less_of_each() -> None:
    spread = estimate(llama_65b(strategy=Strategy.layers, workers=4))
    alone = estimate(llama_65b())
    assert spread.weights == pytest.approx(alone.weights / 4, rel=0.01)
    assert spread.embeddings == alone.embeddings / 2


def test_offload_leaves_the_gpu_only_constants_and_what_is_gathered() -> None:
    offloaded = estimate(llama_65b(strategy=Strategy.fsdp, workers=2, cpu_offload=True))
    assert offloaded.optimizer == offloaded.adapter == offloaded.gradients == offloaded.embeddings == 0
    assert offloaded.weights / GIB < 1.1
    assert offloaded.gathered > 0


def test_parts_add_up_to_the_step() -> None:
    worker = estimate(llama_65b(strategy=Strategy.fsdp, workers=4))
    assert worker.step == worker.held + worker.passing + worker.allocator + worker.context


@pytest.mark.parametrize(
    ("quantization", "bytes_each"),
    [(Quantization.none, 2), (Quantization.int8, 1), (Quantization.nf4, 0.5159)],
)
def test_weights_take_the_bytes_of_their_quantisation(quantization: Quantization, bytes_each: float) -> None:
    model = replace(llama_65b().model, quantization=quantization)
    numbers = 64_761_102_336  # linear layers of the blocks
    assert estimate(llama_65b(model=model)).weights == pytest.approx(numbers * bytes_each, rel=0.002)


def test_low_rank_embeddings_count_as_published() -> None:
    config = compose_run("stage=pretrain", "model=llama_65b", "lora.rank=64", "stage.embeddings=lora")
    # 20,292 characters and three specials on 32,000 rows.
    assert trainable_parameters(describe_run(config, Rows(52_295, 20_295))) == 807_281_536
