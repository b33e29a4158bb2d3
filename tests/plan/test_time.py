"""Operations, bytes and seconds of a step."""

from dataclasses import replace

import pytest

from cqlora.config.choices import Checkpointing, Strategy
from cqlora.config.schema import HardwareConfig
from cqlora.plan.time import Speed, estimate_tokens, flops_per_token, micro_step_seconds, plan_time
from cqlora.plan.workload import describe_run
from tests.plan.runs import compose_run

FAST = Speed(matmul=1e14, memory=1e12, link=1e11, near_link=1e11, host_link=1e10)


@pytest.mark.parametrize(("dropout", "recomputed"), [(0.1, 6.0), (0.0, 6.0 - 2 * 0.2228)])
def test_a_frozen_weight_costs_four_operations_a_token_and_up_to_six_when_recomputed(
    dropout: float, recomputed: float
) -> None:
    # Without dropout the blocks are fused, and the down layers, 22.3% of the weights, are not multiplied again.
    options = ("lora.rank=1", f"lora.dropout={dropout}")
    config = compose_run("stage=pretrain", "model=llama_65b", "hardware=4xa100", *options)
    work = replace(describe_run(config), pack_tokens=0)
    weights = 64_761_102_336
    kept = flops_per_token(replace(work, checkpointing=Checkpointing.none))
    again = flops_per_token(replace(work, checkpointing=Checkpointing.full))
    assert kept / weights == pytest.approx(4, rel=0.01)
    assert again / weights == pytest.approx(recomputed, rel=0.01)


def test_gathering_counts_only_where_it_takes_longer_than_the_work() -> None:
    config = compose_run("stage=pretrain", "model=llama_65b", "hardware=4xa100_40g")
    work = describe_run(config)
    assert micro_step_seconds(work, FAST)["waiting for weights"] == 0
    slow = replace(FAST, near_link=1e8)
    assert micro_step_seconds(work, slow)["waiting for weights"] > 100


def test_the_same_tokens_in_larger_micro_batches_are_no_slower() -> None:
    small = compose_run("experiment=chinese_llama_65b_base", "hardware=4xa100")
    large = compose_run("experiment=chinese_llama_65b_base", "hardware=4xa100", "hardware.micro_batch_size=4")
    slow, fast = plan_time(small), plan_time(large)
    assert slow is not None
    assert fast is not None
    assert fast.tokens_per_step == slow.tokens_per_step == 32 * 2048
    assert fast.step_seconds <= slow.step_seconds


def test_spread_layers_are_as_slow_as_one_gpu() -> None:
    spread = compose_run(
        "experiment=chinese_llama_65b_base",
        "hardware=4xa100",
        "hardware.strategy=layers",
        "hardware.processes_per_node=1",
        "hardware.gpus_per_node=4",
        "hardware.micro_batch_size=4",
        "hardware.activation_checkpointing=full",
    )
    alone = compose_run("experiment=chinese_llama_65b_base", "hardware=1xa100")
    of_four, of_one = plan_time(spread), plan_time(alone)
    assert of_four is not None
    assert of_one is not None
    assert of_four.step_seconds == pytest.approx(of_one.step_seconds, rel=0.01)
    assert describe_run(spread).strategy is Strategy.layers


def test_an_epoch_of_50_000_documents_is_a_tenth_of_a_billion_tokens() -> None:
    config = compose_run("experiment=chinese_llama_65b_base", "hardware=4xa100")
    assert estimate_tokens(config.data, "pretrain") == 100_000_000
    time = plan_time(config)
    assert time is not None
    assert time.steps == 1526


def test_tokens_that_were_counted_replace_the_estimate() -> None:
    config = compose_run("experiment=chinese_llama_65b_base", "hardware=4xa100")
    time = plan_time(config, tokens=65_536_000)
    assert time is not None
    assert time.steps == 1000


def test_a_source_that_takes_all_it_finds_has_no_known_length() -> None:
    assert estimate_tokens(compose_run("stage=pretrain").data, "pretrain") is None


def test_a_gpu_without_figures_has_no_time() -> None:
    config = compose_run("stage=pretrain", "hardware=1x4090")
    unknown = HardwareConfig(name="mine", gpu_memory_gib=24)
    assert plan_time(replace(config, hardware=unknown)) is None
