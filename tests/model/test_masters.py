"""Embeddings that train whole, in 16 bits: as many numbers move as in float32, by as much."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from cqlora.base import read_base, read_card
from cqlora.config.choices import Device, Embeddings, Quantization
from cqlora.config.schema import HardwareConfig, LoraConfig
from cqlora.model.adapters import adapter_state, attach_adapter, save_adapter
from cqlora.model.load import find_head, load_base
from cqlora.plan.memory import plan_memory
from tests.runs import adapter_sha256, build_base, finish_run, losses, typed_run

CPU = torch.device("cpu")
FULL = ("stage=pretrain", "stage.embeddings=full", "model.quantization=none", "lora.dropout=0", "stage.max_steps=3",
        "stage.warmup_steps=0", "stage.learning_rate=1e-4")  # fmt: skip
BFLOAT16 = ("hardware.precision=bfloat16",)
FLOAT16 = ("hardware.precision=float16", "hardware.gradient_scaler=true", "stage.max_steps=30")


def moved(config, folder) -> dict[str, torch.Tensor]:
    """By how much each embedding matrix of the final adapter differs from the base's in the run's own type."""
    held = load_file(f"{config.model.path}/model.safetensors")
    trained = load_file(folder / "adapter" / "adapter_model.safetensors")
    dtype = getattr(torch, config.hardware.precision.name)
    return {
        name: tensor.float() - held[name.removeprefix("base_model.model.")].to(dtype).float()
        for name, tensor in trained.items()
        if "lora_" not in name and name.removeprefix("base_model.model.") in held
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_in_bfloat16_as_many_numbers_move_as_in_float32(tied, workspace, tmp_path):
    base = build_base(workspace, tmp_path / "base", tied)
    paths = (f"model.path={base}", f"model.tie_word_embeddings={tied}")
    found = {}
    for name, precision in (("float32", ()), ("bfloat16", BFLOAT16)):
        config = typed_run(workspace, *FULL, *paths, *precision)
        assert finish_run(config, tmp_path / name) == 0
        found[name] = moved(config, tmp_path / name)
    assert len(found["float32"]) == len(found["bfloat16"]) == (1 if tied else 2)
    for name, exact in found["float32"].items():
        rounded = found["bfloat16"][name]
        assert int((exact != 0).sum()) > 0
        assert int((rounded != 0).sum()) == pytest.approx(int((exact != 0).sum()), rel=0.01)
        assert float(rounded.norm()) == pytest.approx(float(exact.norm()), rel=0.05)
    assert read_card(tmp_path / "bfloat16" / "adapter")["trained_on"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("precision, tied", [(BFLOAT16, True), (FLOAT16, False)], ids=["bfloat16, tied", "float16"])
def test_a_resumed_run_in_16_bits_repeats_the_one_that_was_never_stopped(precision, tied, workspace, tmp_path):
    base = build_base(workspace, tmp_path / "base", tied)
    every = 15 if precision is FLOAT16 else 1
    config = typed_run(workspace, *FULL, *precision, f"model.path={base}", f"model.tie_word_embeddings={tied}",
                       f"stage.checkpoint_every_steps={every}")  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert finish_run(config, whole) == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step-{config.stage.max_steps:08d}")
    assert finish_run(config, resumed) == 0
    assert losses(resumed) == losses(whole) and losses(whole)
    assert adapter_sha256(resumed) == adapter_sha256(whole)
    assert all(float(each.abs().max()) > 0 for each in moved(config, whole).values())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_continued_adapter_begins_with_every_bit_of_its_masters(tied, workspace, tmp_path):
    config = typed_run(workspace, "stage=pretrain").model
    config.path, config.tie_word_embeddings = str(build_base(workspace, tmp_path / "base", tied)), tied
    config.quantization = Quantization.none
    base, hardware = read_base(config.path), HardwareConfig(name="cpu", device=Device.cpu)

    def open_adapted(folder=""):
        model = load_base(base, config, hardware, CPU, torch.bfloat16)
        return attach_adapter(model, base, LoraConfig(rank=4), Embeddings.full, folder)

    adapted = open_adapted()
    matrices = {id(p): p for name, p in adapted.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert len(matrices) == (1 if tied else 2)
    with torch.no_grad():
        for matrix in matrices.values():
            assert matrix.dtype is torch.float32
            matrix.normal_()
    save_adapter(adapted, tmp_path / "adapter", base, adapter_state(adapted))
    again = open_adapted(str(tmp_path / "adapter"))
    for name, tensor in adapter_state(again).items():
        assert torch.equal(tensor, adapter_state(adapted)[name]), name
    tokens = torch.arange(20)[None]
    assert again(input_ids=tokens, use_cache=False).logits.dtype is torch.bfloat16
    head = find_head(again)
    shared = head.modules_to_save["default"].weight is again.get_input_embeddings().modules_to_save["default"].weight
    assert shared == tied


def test_the_plan_counts_float32_masters_and_the_head_s_copy(workspace):
    plans = {}
    for embeddings in ("frozen", "full"):
        config = typed_run(workspace, "stage=pretrain", f"stage.embeddings={embeddings}", *BFLOAT16)
        plans[embeddings] = plan_memory(config).worker
    numbers = 2 * config.model.vocab_size * config.model.hidden_size
    assert plans["full"].adapter - plans["frozen"].adapter == 4 * numbers
    assert plans["full"].optimizer - plans["frozen"].optimizer == 8 * numbers
    assert plans["full"].gradients - plans["frozen"].gradients == 4 * numbers
