"""Whole runs on GPUs that are not there: loaded, placed, stepped, evaluated, stopped, resumed, saved."""

import pytest

OF_OFFLOADED_GRADIENTS = {("autograd", "_to_copy"), ("autograd", "_to_copy, not waited for")}
"""FSDP's own: gradients go to the host, and from the second micro batch on it waits for them to add them up there."""
OF_A_STEP = {("train.trainer._sum_by_source", "_to_copy"), ("train.trainer.accumulate", "_local_scalar_dense")}
"""The losses of a step, and the norm of its gradients."""
FILES = ["manifest.json", "optimizer-rank0.pt", "random-rank0.pt", "state.json", "trainable-rank0.safetensors"]
FSDP = ("model=llama_7b", "hardware=4xa100", "hardware.strategy=fsdp", "stage.global_batch_size=8")
LAYERS = ("hardware.strategy=layers", "hardware.processes_per_node=1", "hardware.gpus_per_node=2")
LAYOUTS = {
    "an older GPU, float16 with a scaler": (
        "model=llama_7b", "hardware=1xa100", "hardware.precision=float16", "hardware.gradient_scaler=true",
        "stage.global_batch_size=2", "model.attention=documents", "hardware.kernels=plain",
    ),
    "fsdp": (*FSDP, "stage.neftune_alpha=5"),
    "fsdp, 16 bit, offload": (
        *FSDP, "model.quantization=none", "hardware.cpu_offload=true", "hardware.activation_checkpointing=full",
    ),
    "layers, flash-attn": (
        "model=llama2_70b", "hardware=4xa100", *LAYERS, "stage.global_batch_size=2", "model.attention=flash",
    ),
}  # fmt: skip


def waits_in(found, phase):
    return {(place, kind) for at, place, kind, _ in found["waits"] if at == phase}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_on_gpus_is_stopped_resumed_and_saved_and_waits_where_it_is_listed(name, fake_gpu):
    older = "older" in name
    found = fake_gpu.ask("train_whole", *LAYOUTS[name], capability=[7, 5] if older else [9, 0])
    assert found["steps"] == [1, 2, 3] and found["events"] == ["checkpoint", "resumed", "checkpoint"]
    assert any("step-00000002 with every bit" in line and "but for their rounding" in line for line in found["said"])
    assert found["files"] == FILES
    assert found["adapter_types"] == ["torch.float32"] and found["adapter_numbers"] > 0
    assert found["types"] == ["float16" if older else "bfloat16"]
    assert waits_in(found, "micro batch") == (OF_OFFLOADED_GRADIENTS if "offload" in name else set())
    assert waits_in(found, "step") <= OF_A_STEP
    # What was allocated before the first step is no part of a step's peak, and a resumed run takes no more.
    first, second, third = found["peak_memory_gib"]
    assert 0 < first <= second < found["planted_gib"] and third == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize("capability, form", [([7, 5], "float16"), ([6, 1], "float32")])
def test_the_engine_holds_what_an_older_gpu_multiplies_fastest(capability, form, fake_gpu):
    found = fake_gpu.ask("open_engine", "auto", capability)
    assert found["form"] == f"matrices in {form} on cuda"
    assert found["on_gpu"] == found["on_host"] == 0


def test_the_engine_quantises_on_the_gpu(fake_gpu):
    found = fake_gpu.ask("open_engine", "nf4", [9, 0])
    assert found["form"] == "NF4 numbers unpacked to bfloat16 on cuda"
    assert found["on_gpu"] > 0 and found["on_host"] == 0
