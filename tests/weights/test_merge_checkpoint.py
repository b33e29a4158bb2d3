"""A checkpoint holds what the adapter folder of its step would: the last one the very weights of the run's adapter."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cqlora.errors import ModelError
from cqlora.merge import MergeConfig, merge
from cqlora.weights.merge_adapter import open_adapter
from cqlora.weights.merge_checkpoint import last_checkpoints
from tests.runs import finish_run, typed_run

EMBEDDINGS = ["lora", "full", "frozen"]


@pytest.fixture(scope="module", params=EMBEDDINGS)
def run(request, tmp_path_factory, workspace) -> Path:
    """A finished run of three steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    config = typed_run(
        workspace, "stage=pretrain", "stage.sequence_length=64", "stage.max_steps=3", "stage.learning_rate=1e-2",
        "stage.checkpoint_every_steps=1", "stage.keep_last=3", f"stage.embeddings={request.param}",
    )  # fmt: skip
    assert finish_run(config, folder) == 0
    return folder


def test_the_last_checkpoint_is_the_adapter_and_an_earlier_one_is_not(run, workspace):
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    first, *_, last = (open_adapter(folder) for folder in last_checkpoints(run, 3))
    assert set(last.reader.specs) <= set(adapter)
    for name in last.reader.specs:
        assert torch.equal(last.reader.read(name), adapter[name]), name
    assert any(not torch.equal(first.reader.read(name), adapter[name]) for name in first.reader.specs)


def test_merging_the_last_checkpoint_gives_what_merging_the_adapter_does(run, workspace, tmp_path):
    base = str(workspace / "models" / "tiny")
    last = str(last_checkpoints(run, 1)[0])
    for name, adapter in (("adapter", str(run / "adapter")), ("checkpoint", last)):
        merge(MergeConfig(base=base, adapter=adapter, output_dir=str(tmp_path / name)))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("adapter", "checkpoint"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_runs_last_checkpoints_are_averaged_as_those_named_one_by_one(run, workspace, tmp_path, capsys):
    base, checkpoints = str(workspace / "models" / "tiny"), list(map(str, last_checkpoints(run, 2)))
    merge(MergeConfig(base=base, run=str(run), last=2, output_dir=str(tmp_path / "run")))
    assert "2 adapters averaged and merged" in capsys.readouterr().out
    merge(MergeConfig(base=base, adapter_average=checkpoints, output_dir=str(tmp_path / "named")))
    alone = []
    for number, checkpoint in enumerate(checkpoints):
        merge(MergeConfig(base=base, adapter=checkpoint, output_dir=str(tmp_path / f"{number}")))
        alone.append(load_file(tmp_path / f"{number}" / "model.safetensors"))
    named = load_file(tmp_path / "named" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.equal(tensor, named[name])
        mean = (alone[0][name].double() + alone[1][name].double()) / 2
        torch.testing.assert_close(tensor.double(), mean, atol=1e-6, rtol=1e-5, msg=name)


def test_checkpoints_that_are_missing_damaged_or_alone_are_refused(run, tmp_path):
    with pytest.raises(ModelError, match=r"has 3 checkpoints and last=4 .*stage\.keep_last=4"):
        last_checkpoints(run, 4)
    with pytest.raises(ModelError, match=r"has no checkpoints/step-"):
        last_checkpoints(tmp_path, 4)
    moved = tmp_path / "moved" / "step-00000003"
    shutil.copytree(last_checkpoints(run, 1)[0], moved)
    with pytest.raises(ModelError, match="put it back into its run"):
        open_adapter(moved)
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    file = last_checkpoints(whole, 1)[0] / "trainable-rank0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match="not as it was written"):
        open_adapter(file.parent)
