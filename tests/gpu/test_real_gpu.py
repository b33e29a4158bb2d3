"""What only a GPU can show (`make test-gpu`): numbers, the real allocator, NCCL, speed. Skipped where there is none."""

import time

import bitsandbytes as bnb
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cqlora.config.choices import Attention
from cqlora.errors import ModelError
from cqlora.model.attention import document_kwargs, name_attention
from cqlora.plan.estimate import GIB
from cqlora.plan.memory import plan_memory
from cqlora.train.optimizer import load_optimizer
from tests.gpu import real
from tests.gpu.real import DEVICE, DRY, ON_GPU, difference, train, train_on_nodes, why_no_bfloat16, why_no_gpu
from tests.gpu.step import build_module, compose_hollow, end_step, take_micro_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_no_gpu() is not None, reason=str(why_no_gpu()))]
two_gpus = pytest.mark.skipif(why_no_gpu(2) is not None, reason=str(why_no_gpu(2)))
four_gpus = pytest.mark.skipif(why_no_gpu(4) is not None, reason=str(why_no_gpu(4)))
bfloat16_gpu = pytest.mark.skipif(why_no_bfloat16() is not None, reason=str(why_no_bfloat16()))

SIXTEEN_BITS = 0.02
"""How far a loss in 16 bits may be from the processor's in float32, as a share of it."""
SAME_KERNELS = 1e-3
"""How far a loss may be from that of the same run on the same GPU, whose kernels add in no fixed order."""
DOCUMENTS = [300, 300, 17, 407]
SHAPE = ("model.num_hidden_layers=4", "lora.rank=64", "hardware.micro_batch_size=1")
SMALL_SHAPE = (
    "model.hidden_size=256", "model.intermediate_size=512", "model.num_attention_heads=8",
    "model.num_key_value_heads=8", "model.vocab_size=2048", "stage.sequence_length=256", "hardware.precision=float32",
)  # fmt: skip


IN_BFLOAT16 = (*ON_GPU, "hardware.precision=bfloat16")


@pytest.fixture(scope="module")
def of_processor(workspace, tmp_path_factory):
    """Losses of the run that the others are compared with."""
    return train(workspace, tmp_path_factory.mktemp("cpu"), "hardware.precision=float32")


@pytest.fixture(scope="module")
def of_one_gpu(workspace, tmp_path_factory):
    """Losses of the same run on one GPU."""
    return train(workspace, tmp_path_factory.mktemp("gpu"), *IN_BFLOAT16)


def test_a_run_in_bfloat16_has_the_processors_losses(of_processor, of_one_gpu, figures):
    apart = difference(of_one_gpu, of_processor)
    figures["losses in bfloat16 beside the processor's"] = f"at most {apart:.1e} apart"
    assert apart < SIXTEEN_BITS


def test_a_run_in_float16_with_a_scaler_has_the_processors_losses(of_processor, workspace, tmp_path, figures):
    scaled = ("hardware.precision=float16", "hardware.gradient_scaler=true")
    apart = difference(train(workspace, tmp_path, *ON_GPU, *scaled), of_processor)
    figures["losses in float16 beside the processor's"] = f"at most {apart:.1e} apart"
    assert apart < SIXTEEN_BITS


def test_the_same_run_twice_has_the_same_losses_but_for_rounding(of_one_gpu, workspace, tmp_path, figures):
    apart = difference(train(workspace, tmp_path, *IN_BFLOAT16), of_one_gpu)
    figures["the same run twice"] = f"losses at most {apart:.1e} apart"
    assert apart < SAME_KERNELS


@pytest.mark.parametrize("optimizer", ["adamw"] if DRY else ["adamw", "paged_adamw", "paged_adamw_8bit"])
def test_a_resumed_run_goes_on_as_one_that_never_stopped(optimizer, of_one_gpu, workspace, tmp_path, figures):
    options = (*IN_BFLOAT16, f"stage.optimizer={optimizer}")
    expected = of_one_gpu if optimizer == "adamw" else train(workspace, tmp_path / "whole", *options)
    train(workspace, tmp_path / "stopped", *options, "stage.max_steps=2")
    steps = train(workspace, tmp_path / "stopped", *options)[:4]
    apart = difference(steps, expected[:4])
    figures[f"stopped and resumed, {optimizer}"] = f"losses at most {apart:.1e} apart"
    assert apart < SAME_KERNELS


def test_paged_states_are_paged_again_once_loaded():
    parameter = torch.nn.Parameter(torch.ones(400, 500, device=DEVICE))
    parameter.grad = torch.ones_like(parameter)
    first = bnb.optim.PagedAdamW32bit([parameter])
    first.step()
    second = bnb.optim.PagedAdamW32bit([parameter])
    load_optimizer(second, first.state_dict())
    held, expected = (each.state[parameter]["state1"] for each in (second, first))
    assert torch.equal(held.cpu(), expected.cpu())
    assert DRY or held.is_paged


@pytest.mark.parametrize("choice", [Attention.documents, Attention.flash, Attention.varlen])
def test_attention_keeps_documents_apart_with_the_numbers_of_each_alone(choice, figures):
    try:
        name = name_attention(choice, DEVICE.type)
    except ModelError as error:
        pytest.skip(str(error))
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, use_cache=False, **heads)
    model = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    tokens = torch.randint(512, (1, sum(DOCUMENTS)), device=DEVICE)
    with torch.no_grad():
        alone = torch.cat([model(part).logits for part in tokens.split(DOCUMENTS, dim=1)], dim=1)
        model.set_attn_implementation(name)
        positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None].to(DEVICE)
        packed = model(tokens, position_ids=positions, **document_kwargs(DOCUMENTS, DEVICE)).logits
    apart = float((packed - alone).abs().max() / alone.abs().max())
    figures[f"attention={choice.name}, packed beside each document alone"] = f"at most {apart:.1e} apart"
    assert apart < SIXTEEN_BITS


@two_gpus
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_have_the_losses_of_one(strategy, of_one_gpu, workspace, tmp_path, figures):
    workers = ("hardware.processes_per_node=2", f"hardware.strategy={strategy}")
    apart = difference(train(workspace, tmp_path, *IN_BFLOAT16, *workers), of_one_gpu)
    figures[f"two workers under {strategy} beside one"] = f"losses at most {apart:.1e} apart"
    assert apart < SIXTEEN_BITS


@four_gpus
@pytest.mark.parametrize("offload", ["false", "true"])
def test_two_nodes_that_hold_a_model_each_have_the_losses_of_one_gpu(offload, workspace, tmp_path, figures):
    nodes = ("hardware.nodes=2", "hardware.processes_per_node=2", "hardware.strategy=fsdp", "stage.global_batch_size=4")
    alone = train(workspace, tmp_path / "one", *IN_BFLOAT16, "stage.global_batch_size=4")
    ours = train_on_nodes(workspace, tmp_path / "four", *IN_BFLOAT16, *nodes, f"hardware.cpu_offload={offload}")
    figures[f"fsdp, two nodes of two GPUs, offload {offload}"] = f"losses at most {difference(ours, alone):.1e} apart"
    assert difference(ours, alone) < SIXTEEN_BITS


@two_gpus
@pytest.mark.skipif(DRY, reason="spreads blocks over GPUs alone")
def test_layers_over_two_gpus_have_the_losses_of_one(of_one_gpu, workspace, tmp_path, figures):
    ours = train(workspace, tmp_path, *IN_BFLOAT16, "hardware.strategy=layers", "hardware.gpus_per_node=2")
    figures["layers over two GPUs beside one"] = f"losses at most {difference(ours, of_one_gpu):.1e} apart"
    assert difference(ours, of_one_gpu) < SIXTEEN_BITS


@bfloat16_gpu
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_step_of_7bs_shape_takes_the_planned_memory_and_some_time(checkpointing, tmp_path, figures):
    shape = ("hardware=cpu", *SMALL_SHAPE) if DRY else ("hardware=1xa100",)
    chosen = f"hardware.activation_checkpointing={checkpointing}"
    config = compose_hollow(tmp_path, "model=llama_7b", *shape, *SHAPE, chosen)
    module, optimizer = build_module(config, DEVICE)
    real.free_memory()
    end_step(config, module, optimizer, DEVICE)
    (allocated, reserved), planned = real.peak_bytes(), plan_memory(config).worker
    seconds = time_micro_batches(config, module)
    in_gib = [size / GIB for size in (allocated, planned.allocated, reserved, planned.reserved)]
    figures[f"4 blocks of 7B, activation_checkpointing={checkpointing}"] = (
        "{:.2f} GiB allocated (plan {:.2f}), {:.2f} reserved (plan {:.2f})".format(*in_gib)
        + f", {config.stage.sequence_length / seconds:,.0f} tokens/s"
    )
    assert DRY or abs(planned.allocated / allocated - 1) < 0.1


def time_micro_batches(config, module, times=5):
    """Seconds of one, the mean of some after one that warms up."""
    take_micro_batch(config, module, device=DEVICE)
    real.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        take_micro_batch(config, module, device=DEVICE)
    real.synchronize()
    return (time.perf_counter() - started) / times
