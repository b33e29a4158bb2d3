"""Bytes of tensors on a GPU in a step, as a run's own modules hold them on one that is not there, beside the plan's."""

import pytest

GIB = 2**30
BOUND = 0.08
"""How far the plan's `allocated` may be from what was counted, as a share of it."""

ONE, FOUR, EIGHT = "hardware=1xa100", "hardware=4xa100", "hardware=8xa100"
KEPT, AGAIN = "hardware.activation_checkpointing=none", "hardware.activation_checkpointing=full"
FSDP, OFFLOAD = "hardware.strategy=fsdp", "hardware.cpu_offload=true"
QWEN3_8B = ("model=llama3_8b", "model.intermediate_size=12288", "model.vocab_size=151936", "model.head_norms=true")
LAYERS = ("hardware.strategy=layers", "hardware.gpus_per_node=4", "hardware.processes_per_node=1")


def blocks(number: int) -> str:
    return f"model.num_hidden_layers={number}"


def batch(packs: int) -> str:
    return f"hardware.micro_batch_size={packs}"


SETTINGS = {
    "7B, kept": ("model=llama_7b", ONE, blocks(3), KEPT, batch(2)),
    "7B, recomputed, rank 64": ("model=llama_7b", ONE, blocks(3), AGAIN, batch(4), "lora.rank=64"),
    "7B, dropout": ("model=llama_7b", ONE, blocks(2), KEPT, batch(1), "lora.dropout=0.1"),
    "13B, recomputed": ("model=llama_13b", "hardware=1x4090", blocks(2), AGAIN, batch(1), "lora.rank=128"),
    "70B, 4,096 tokens": ("model=llama2_70b", ONE, blocks(2), AGAIN, batch(1), "stage.sequence_length=4096"),
    "7B, 16 bit, fsdp": ("model=llama_7b", FOUR, FSDP, blocks(2), KEPT, batch(1), "model.quantization=none"),
    "7B, fsdp, offload": ("model=llama_7b", FOUR, FSDP, OFFLOAD, blocks(2), KEPT, batch(1)),
    "13B, fsdp, recomputed": ("model=llama_13b", FOUR, FSDP, blocks(2), AGAIN, batch(4)),
    "33B, fsdp, kept": ("model=llama_33b", EIGHT, FSDP, blocks(2), KEPT, batch(1)),
    "65B, fsdp, recomputed": ("model=llama_65b", EIGHT, FSDP, blocks(2), AGAIN, batch(2), "lora.rank=64"),
    "70B, fsdp, kept": ("model=llama2_70b", EIGHT, FSDP, blocks(2), KEPT, batch(1)),
    "Qwen 3 8B, kept": (*QWEN3_8B, ONE, blocks(3), KEPT, batch(2)),
    "7B, layers": ("model=llama_7b", FOUR, *LAYERS, blocks(4), KEPT, batch(2)),
}
WHOLE = {"7B whole": ("model=llama_7b", ONE, KEPT, batch(2), "lora.rank=64")}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_plan_counts_the_tensors_of_a_step(name, fake_gpu):
    check_setting(SETTINGS[name], fake_gpu.ask("measure_step", *SETTINGS[name]))


@pytest.mark.slow
def test_the_plan_counts_the_tensors_of_a_whole_7b(fake_gpu):
    check_setting(WHOLE["7B whole"], fake_gpu.ask("measure_step", *WHOLE["7B whole"]))


def check_setting(overrides, found):
    assert abs(found["planned"] / found["measured"] - 1) < BOUND
    assert found["held"] == pytest.approx(found["planned_held"], rel=0.01)
    # An upper bound: what stays of loading is compared with what there is before anything is loaded.
    assert found["loading"] < 1.02 * found["planned_loading"]
    assert found["types"] == ["bfloat16"]
    assert found["gpus"] == (4 if LAYERS[0] in overrides else 1)
    assert found["fused_mlps"] == (0 if "lora.dropout=0.1" in overrides else count_blocks(overrides))


def count_blocks(overrides):
    of_config = [int(each.partition("=")[2]) for each in overrides if each.startswith("model.num_hidden_layers")]
    return of_config[0] if of_config else 32
