"""The alarm: what has become dearer than it may since a run's start is marked, and the probe is evaluate's own."""

from pathlib import Path

import numpy as np
import pytest

from cqlora.base import read_base
from cqlora.data.cache import prepare_cache
from cqlora.data.tokenizer import PlainTokenizer
from cqlora.engine import LlamaEngine
from cqlora.evaluation.probe import EXAMPLES, ROUNDS, list_patterns, probe
from cqlora.evaluation.text import score_sequences
from cqlora.system.metrics import read_metrics
from cqlora.train.forgetting import encode_probe, find_forgotten
from tests.runs import build_once, finish_run, typed_run


def row(kind: str, source: str, language: str, loss: float) -> dict:
    return {"kind": kind, "source": source, "language": language, "loss": loss}


def test_english_and_the_probe_are_watched_and_chinese_is_not():
    start = [
        row("eval", "wiki", "en", 2.0),
        row("eval", "wiki", "zh", 2.0),
        row("probe", "probe/translation", "zh", 1.0),
    ]
    now = [row("eval", "wiki", "en", 2.2), row("eval", "wiki", "zh", 4.0), row("probe", "probe/translation", "zh", 1.1)]
    found = list(find_forgotten(start, now, 0.05))
    assert [(each["source"], each["language"]) for each in found] == [("wiki", "en"), ("probe/translation", "zh")]
    assert found[0] == {
        "source": "wiki", "language": "en", "start": 2.0, "now": 2.2, "rise": pytest.approx(0.1),
    }  # fmt: skip
    assert not list(find_forgotten(start, now, 0.11))
    assert not list(find_forgotten(start, start, 0.0))
    assert not list(find_forgotten([], now, 0.0)), "nothing to compare with"


@pytest.fixture(scope="module")
def watched(workspace: Path) -> Path:
    """A run whose rate is far too high, watched for any rise at all."""
    config = typed_run(
        workspace, "stage=pretrain", "stage.max_steps=3", "stage.epochs=null", "stage.learning_rate=1",
        "stage.max_forgetting=0", "stage.warmup_steps=0", "stage.eval_every_steps=1", "stage.eval_probe=true",
        "stage.eval_tokens=16384", "stage.eval_characters=400",
    )  # fmt: skip

    def build(folder: Path) -> None:
        assert finish_run(config, folder) == 0

    return build_once(workspace / "unlearning", build)


def test_what_became_dearer_is_marked_and_nothing_else(watched):
    rows = read_metrics(watched)
    measured = [r for r in rows if r["kind"] == "probe" or (r["kind"] == "eval" and r["language"] == "en")]
    start = {(r["source"], r["language"]): r["loss"] for r in measured if r["step"] == 0}
    risen = {(r["step"], r["source"], r["language"]) for r in measured if r["loss"] > start[r["source"], r["language"]]}
    marked = {(r["step"], r["source"], r["language"]) for r in rows if r.get("event") == "forgetting"}
    assert risen and marked == risen


def test_a_run_without_a_limit_is_not_watched(workspace, tmp_path):
    config = typed_run(
        workspace, "stage=pretrain", "stage.max_steps=1", "stage.epochs=null", "stage.learning_rate=1",
        "stage.warmup_steps=0", "stage.max_forgetting=null",
    )  # fmt: skip
    assert finish_run(config, tmp_path / "run") == 0
    assert not [r for r in read_metrics(tmp_path / "run") if r.get("event") == "forgetting"]


def test_the_probe_before_the_first_step_is_that_of_the_base(watched, workspace):
    """Against the engine on the same sequences: the first round of what `cqlora evaluate` measures."""
    base = read_base(workspace / "models" / "tiny")
    engine = LlamaEngine(base.path, "", use_lora=False, quantization="nf4", dtype="float32", device="cpu")
    found = {r["language"]: r for r in read_metrics(watched) if r["kind"] == "probe" and r["step"] == 0}
    assert set(found) == {"zh", "en"}
    for each in encode_probe(base, seed=1):
        scored = score_sequences(engine, list_pieces(each.token_ids, each.document_lengths), 2048)
        # The first token of a sequence is predicted from nothing.
        nats = np.concatenate([[0.0, *-scores] for scores in scored])
        first, last = (nats[each.places == place].sum() / each.characters for place in (1, 2))
        told = found[each.pattern.language]
        assert (told["first_loss"], told["loss"]) == pytest.approx((first, last), rel=1e-3)
        assert told["gain"] == pytest.approx(told["first_loss"] - told["loss"])


def test_the_watched_patterns_are_among_evaluates_own(workspace):
    names = {(pattern.name, pattern.language) for pattern in list_patterns()}
    base = read_base(workspace / "models" / "tiny")
    for each in encode_probe(base, seed=1):
        assert (each.pattern.name, each.pattern.language) in names
        assert len(each.document_lengths) == EXAMPLES < EXAMPLES * ROUNDS
    engine = LlamaEngine(base.path, "", use_lora=False, dtype="float32", device="cpu")
    assert len(probe(engine, list_patterns()[0], 1, 2048)["losses"]) == EXAMPLES


def test_a_limit_in_characters_takes_the_same_documents_of_every_vocabulary(workspace):
    """Pieces of 64 tokens and of 512 are cut elsewhere, and the documents are the same, each to its end."""
    special = PlainTokenizer(workspace / "models" / "tiny").special
    taken = []
    for length in (64, 512):
        config = typed_run(workspace, "stage=pretrain", f"stage.sequence_length={length}")
        split = prepare_cache(config, read_base(config.model.path)).splits["val"]
        packs = split.packs_of(0, max_characters=300)
        assert sum(map(count_characters, packs)) < sum(map(count_characters, split.packs_of(0)))
        pieces = [piece for pack in packs for piece in list_pieces(pack.token_ids, pack.document_lengths)]
        begun, ended = (sum(piece[place] == token for piece in pieces) for place, token in (
            (0, special.document_start), (-1, special.document_end),
        ))  # fmt: skip
        assert begun == ended
        taken.append(begun)
    assert taken[0] == taken[1] > 0


def count_characters(pack) -> int:
    return sum(pack.characters)


def list_pieces(ids: np.ndarray, lengths: list[int]) -> list[list[int]]:
    """The tokens of each document of a pack."""
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
