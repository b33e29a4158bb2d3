"""Every cell of the table of kinds is tried on a small model, and the pages that print the table say what it says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cqlora.architectures import MODEL_TYPES, Part
from cqlora.base import read_base
from cqlora.config.choices import ModelFormat, Precision
from cqlora.engine import LlamaEngine
from cqlora.launch.settle import look_ahead
from cqlora.model.adapters import attach_adapter
from cqlora.model.fused import fuse_blocks
from cqlora.model.fused.mlp import FusedMLP
from cqlora.model.load import load_base
from cqlora.plan.shapes import base_parameters
from cqlora.plan.workload import describe_run
from cqlora.vocab.config import VocabConfig, VocabKind
from cqlora.weights.extend import extend
from tests.conftest import ROOT
from tests.kinds import OPTIONS, write_kind
from tests.runs import finish_run, typed_run
from tests.weights.adapters import load, logits, write_adapter
from tests.weights.test_merge import merge

RUN = ("stage=pretrain", "model=auto", "lora.dropout=0", "stage.max_steps=1", "stage.sequence_length=96")
ADAPTER = "adapter_model.safetensors"


def train(base: Path, workspace: Path, folder: Path) -> None:
    assert finish_run(typed_run(workspace, *RUN, f"model.path={base}"), folder / "run") == 0
    assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / "run" / "adapter" / ADAPTER).values())


def plan(base: Path, workspace: Path, folder: Path) -> None:
    config = typed_run(workspace, *RUN, f"model.path={base}")
    stock = sum(parameter.numel() for parameter in load(base).parameters())
    assert base_parameters(describe_run(config, look_ahead(config).rows).model) == stock


def fuse(base: Path, workspace: Path, folder: Path) -> None:
    config, read = typed_run(workspace, *RUN, f"model.path={base}"), read_base(base)
    model = load_base(read, config.model, config.hardware, torch.device("cpu"), torch.float32)
    adapted = attach_adapter(model, read, config.lora, config.stage.embeddings, "")
    assert fuse_blocks(adapted)
    assert sum(isinstance(module, FusedMLP) for module in adapted.modules()) == config.model.num_hidden_layers


def train_rows(base: Path, workspace: Path, folder: Path) -> None:
    extend(base, folder / "extended", VocabConfig(kind=VocabKind.auto, size=40, min_frequency=2), 1 << 30, copy=True)
    assert finish_run(typed_run(workspace, *RUN, f"model.path={folder / 'extended'}"), folder / "run") == 0
    rows = [t for name, t in load_file(folder / "run" / "adapter" / ADAPTER).items() if "trainable_tokens" in name]
    assert {len(each) for each in rows} == {read_base(folder / "extended").added_rows}


def write_merged(base: Path, workspace: Path, folder: Path) -> None:
    merged = merge(base, [write_adapter(base, folder / "adapter")], folder / "merged")
    assert (logits(load(merged)) - logits(load(base))).abs().max() > 0.01


def write_nf4(base: Path, workspace: Path, folder: Path) -> None:
    adapter, nf4 = write_adapter(base, folder / "adapter"), ModelFormat.nf4
    merged = merge(base, [adapter], folder / "nf4", format=nf4, precision=Precision.float32)
    model = AutoModelForCausalLM.from_pretrained(merged).train()
    assert torch.isfinite(logits(model)).all()


def write_gguf(base: Path, workspace: Path, folder: Path) -> None:
    merged = merge(base, [write_adapter(base, folder / "adapter")], folder / "gguf", format=ModelFormat.gguf)
    assert len(GGUFReader(merged / "gguf.f16.gguf").tensors) == len(load(base).state_dict())


def generate(base: Path, workspace: Path, folder: Path) -> None:
    engine = LlamaEngine(base, "", use_lora=False, dtype="float32")
    assert engine.generate([{"role": "user", "text": "长江"}], temperature=0, max_new_tokens=8, ignore_end=True)


TRY: dict[Part, Callable[[Path, Path, Path], None]] = {
    Part.train: train, Part.plan: plan, Part.fused: fuse, Part.rows: train_rows, Part.merge: write_merged,
    Part.nf4: write_nf4, Part.gguf: write_gguf, Part.engine: generate,
}  # fmt: skip
PRINTED = [Part.train, Part.plan, Part.fused, Part.rows, Part.merge, Part.nf4, Part.gguf, Part.engine]
"""The rows of the pages' table, in order."""
WORDS = ["run", "plan", "", "extend", "merge", "format=nf4", "format=gguf", "chat"]
"""What each row's name holds between backticks in every language."""


@pytest.mark.parametrize("part", Part, ids=lambda part: part.name)
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_every_cell_of_the_table_holds(kind, part, workspace, tmp_path):
    assert part in MODEL_TYPES[kind], "the table has no empty cell; one that gets one needs a refusal tried here"
    TRY[part](write_kind(kind, tmp_path / "base"), workspace, tmp_path)


def test_every_kind_has_a_small_model_and_every_part_is_tried():
    assert MODEL_TYPES.keys() == OPTIONS.keys() and TRY.keys() == set(Part) == set(PRINTED)


@pytest.mark.parametrize("page, yes", [("models.md", "yes"), ("models.zh-CN.md", "支持")])
def test_the_pages_print_the_table(page, yes):
    lines = [line for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert head[1:] == [f"`{kind}`" for kind in MODEL_TYPES]
    for part, word, (name, *cells) in zip(PRINTED, WORDS, rows, strict=True):
        assert f"{word}`" in name or not word
        assert [cell == yes for cell in cells] == [part in parts for parts in MODEL_TYPES.values()], name
