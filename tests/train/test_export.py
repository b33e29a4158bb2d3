"""A checkpoint becomes the adapter that the run would have written there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cqlora.base import read_card
from cqlora.errors import CheckpointError
from cqlora.train.export import export_checkpoint, find_checkpoint
from tests.runs import build_once, extend_tiny, finish_run, finish_workers, typed_run

KINDS = {
    "lora": (),
    "pissa": ("lora.method=pissa", "lora.dropout=0"),
    "dora": ("lora.method=dora",),
    "whole embeddings": ("stage.embeddings=full",),
    "sft": ("stage=sft", "stage.system_prompt='好'"),
}


def train(workspace: Path, name: str, *overrides: str) -> Path:
    """A run of two steps, with a checkpoint after each."""
    stage = () if any(each.startswith("stage=") for each in overrides) else ("stage=pretrain",)
    steps = ("stage.max_steps=2", "stage.epochs=null", "stage.checkpoint_every_steps=1")

    def build(folder: Path) -> None:
        config = typed_run(workspace, *stage, *steps, *overrides)
        if config.hardware.world_size > 1:
            assert set(finish_workers(config, folder)) == {0}
        else:
            assert finish_run(config, folder) == 0

    return build_once(workspace / f"export_{name.replace(' ', '_')}", build)


def compare(exported: Path, adapter: Path) -> None:
    """Equal in every tensor, in PEFT's configuration and in what the card says of training."""
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (exported, adapter))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    settings = [json.loads((folder / "adapter_config.json").read_text()) for folder in (exported, adapter)]
    for each in settings:
        each["target_modules"] = sorted(each["target_modules"])
    assert settings[0] == settings[1]
    cards = [read_card(folder) for folder in (exported, adapter)]
    differing = {key for key in cards[0].keys() | cards[1].keys() if cards[0].get(key) != cards[1].get(key)}
    assert differing <= {"adapter_config_sha256"}


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
def test_the_last_checkpoint_is_the_adapter_of_the_run(overrides, workspace, request, tmp_path):
    run = train(workspace, request.node.callspec.id, *overrides)
    export_checkpoint(run, find_checkpoint(run, ""), tmp_path / "adapter")
    compare(tmp_path / "adapter", run / "adapter")


def test_added_rows_are_exported_too(workspace, tmp_path):
    base = (
        extend_tiny(workspace, workspace / "export_base", tied=True)
        if not (workspace / "export_base").exists()
        else (workspace / "export_base" / "extended")
    )
    run = train(workspace, "rows", f"model.path={base}", "model.tie_word_embeddings=true")
    export_checkpoint(run, find_checkpoint(run, ""), tmp_path / "adapter")
    compare(tmp_path / "adapter", run / "adapter")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_several_workers_trained_is_exported_whole(strategy, workspace, tmp_path):
    run = train(workspace, strategy, "hardware=2xcpu", f"hardware.strategy={strategy}", "stage.global_batch_size=2")
    export_checkpoint(run, find_checkpoint(run, "step-00000002"), tmp_path / "adapter")
    compare(tmp_path / "adapter", run / "adapter")


def test_an_earlier_checkpoint_is_another_adapter(workspace, tmp_path):
    run = train(workspace, "lora")
    export_checkpoint(run, find_checkpoint(run, "step-00000001"), tmp_path / "adapter")
    ours, last = (load_file(each / "adapter_model.safetensors") for each in (tmp_path / "adapter", run / "adapter"))
    assert any(not torch.equal(tensor, last[name]) for name, tensor in ours.items())


def test_checkpoints_that_are_missing_or_damaged_are_refused(workspace, tmp_path):
    run = Path(shutil.copytree(train(workspace, "lora"), tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"step-00000009 cannot be used \(it is not there\).*step-00000001, step"):
        find_checkpoint(run, "step-00000009")
    (run / "checkpoints" / "step-00000002" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json is not as it was written"):
        find_checkpoint(run, "step-00000002")
    assert find_checkpoint(run, "").name == "step-00000001"
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        find_checkpoint(run, "")
