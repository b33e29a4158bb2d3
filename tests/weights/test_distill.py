"""Rows fitted to the base's own reading: where segmentations meet, what moves, and that it reads better for it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn.functional import cross_entropy

from cqlora.base import read_base
from cqlora.data.sources import SAMPLE_DIR
from cqlora.errors import ConfigError, DataError
from cqlora.extend import ExtendConfig
from cqlora.system.model_config import INPUT, OUTPUT
from cqlora.vocab.config import RowInit, VocabConfig, VocabKind
from cqlora.weights.distill import Reader, Window, align, distill_rows, draw_batches, measure_loss
from cqlora.weights.extend import extend
from tests.weights.adapters import write_tiny_base

CORPUS = str(SAMPLE_DIR / "sample_zh" / "train.jsonl")
TEXT = "长江是亚洲最长的河流，流经十一个省级行政区。The Yangtze is long. 🀄"


def vocabulary(init: RowInit, **changed) -> VocabConfig:
    steps = {"distill_steps": 12} if init is RowInit.distilled else {}
    return VocabConfig(kind=VocabKind.bpe, size=60, corpus=[CORPUS], init=init, **(steps | changed))


def extended(base: Path, folder: Path, init: RowInit, **changed) -> Path:
    extend(base, folder, vocabulary(init, **changed), 10**9, copy=True)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("distill") / "base", tied=request.param)


@pytest.fixture(scope="module")
def weighted(base, tmp_path_factory) -> Path:
    return extended(base, tmp_path_factory.mktemp("weighted") / "weighted", RowInit.weighted)


@pytest.fixture(scope="module")
def distilled(base, tmp_path_factory) -> Path:
    return extended(base, tmp_path_factory.mktemp("distilled") / "distilled", RowInit.distilled)


def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def loss_of(base: Path, folder: Path) -> float:
    """What is fitted, of a folder's rows on text that was drawn with another seed."""
    first, state = read_base(folder).first_added_row, load_file(folder / "model.safetensors")
    vocab = vocabulary(RowInit.distilled, seed=7, distill_steps=4)
    rows = {name: nn.Parameter(state[name][first:]) for name in (INPUT, OUTPUT) if name in state}
    reader = Reader(base, first)
    with torch.no_grad():
        batches = draw_batches(tokenizer(base), tokenizer(folder), first, vocab)
        return float(torch.stack([measure_loss(reader, rows, batch, first) for batch in batches]).mean())


def test_fitted_rows_read_more_as_the_base_does_and_only_they_moved(base, weighted, distilled):
    assert loss_of(base, distilled) < loss_of(base, weighted)
    start, fitted = (load_file(folder / "model.safetensors") for folder in (weighted, distilled))
    first, pieces = read_base(distilled).first_added_row, json.loads((distilled / "vocab_report.json").read_text())
    control = first + pieces["pieces_added"]
    assert start.keys() == fitted.keys()
    for name, tensor in fitted.items():
        if name not in (INPUT, OUTPUT):
            assert torch.equal(tensor, start[name]), name
            continue
        assert torch.equal(tensor[:first], start[name][:first])
        assert (tensor[first:control] - start[name][first:control]).abs().amax(dim=1).gt(0).float().mean() > 0.5
    assert torch.equal(fitted[INPUT][control:], start[INPUT][control:]) or OUTPUT not in fitted


def test_the_same_seed_fits_the_same_rows_and_another_others(base, distilled, tmp_path):
    again = load_file(extended(base, tmp_path / "again", RowInit.distilled) / "model.safetensors")
    other = load_file(extended(base, tmp_path / "other", RowInit.distilled, seed=2) / "model.safetensors")
    fitted = load_file(distilled / "model.safetensors")
    assert torch.equal(fitted[INPUT], again[INPUT])
    assert not torch.equal(fitted[INPUT], other[INPUT])


def test_segmentations_meet_where_both_have_read_the_same_characters(base, distilled):
    before, after = tokenizer(base), tokenizer(distilled)
    window = align(before.encode(TEXT), after.encode(TEXT), read_base(distilled).first_added_row)
    assert len(window.new_ids) < len(window.old_ids)
    assert window.ends[-1] == (len(window.old_ids) - 1, len(window.new_ids) - 1)
    for old, new in window.ends:
        assert before.decode(window.old_ids[: old + 1]) == after.decode(window.new_ids[: new + 1])
    assert align(before.encode(TEXT), after.encode(TEXT), 10**6) is None
    assert align(before.encode("长"), after.encode("长"), 0) is None


def test_a_new_token_with_the_row_of_the_old_one_that_it_stands_for_is_read_the_same(base):
    """Closed form: the states agree, so what is left is how likely the tokens are to the base's own last states."""
    first = 300
    reader = Reader(base, first)
    old = [40, 41, 42, 43]
    window = Window(old, [40, first, 42, first + 1], [(place, place) for place in range(4)])
    rows = {INPUT: nn.Parameter(reader.old_input[[41, 43]].clone())}
    rows[OUTPUT] = nn.Parameter(reader.old_output[[41, 43]].clone())
    _, last = reader.read(torch.tensor([old]))
    logits = last[0, :3] @ torch.cat([reader.old_output, rows[OUTPUT]]).T
    expected = cross_entropy(logits, torch.tensor([first, 42, first + 1]))
    torch.testing.assert_close(measure_loss(reader, rows, [window], first), expected, atol=1e-5, rtol=1e-5)
    rows[INPUT].data += 0.1
    assert measure_loss(reader, rows, [window], first) > expected + 1e-3


def test_padding_on_the_right_changes_no_state(base):
    reader = Reader(base, 300)
    long, short = torch.arange(40, 60), torch.arange(50, 57)
    padded = torch.stack([long, torch.cat([short, torch.zeros(13, dtype=torch.long)])])
    for together, alone in zip(reader.read(padded), reader.read(short[None]), strict=True):
        torch.testing.assert_close(together[1, :7], alone[0], atol=1e-5, rtol=1e-5)


def test_a_corpus_without_new_tokens_is_refused(base, weighted, tmp_path):
    (tmp_path / "english.txt").write_text("The Yangtze is the longest river in Asia.\n" * 9)
    vocab = vocabulary(RowInit.distilled)
    vocab.corpus = [str(tmp_path / "english.txt")]
    with pytest.raises(DataError, match=r"no text with a new token .* use vocab\.init=weighted"):
        distill_rows(base, weighted, 10**6, {}, vocab)


def test_a_gguf_file_cannot_be_run_and_is_refused(base, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"vocab\.init=distilled runs the base"):
        ExtendConfig(base=str(tmp_path / "model.gguf"), output_dir="o", vocab=vocabulary(RowInit.distilled))
    shutil.rmtree(tmp_path)
