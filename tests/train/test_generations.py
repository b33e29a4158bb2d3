"""Replies during training are the engine's own, and a run with them is to the last bit the run without."""

from pathlib import Path
from typing import Any

import pytest

from cqlora.config.schema import MOST_PROMPTS
from cqlora.engine import LlamaEngine
from cqlora.evaluation.generations import generate, read_prompts
from cqlora.system.metrics import evaluated_values, read_metrics
from tests.runs import SMALL, adapter_sha256, build_once, finish_run, finish_workers, losses, typed_run
from tests.train.test_distributed import DDP, FSDP

RUN = ("stage.max_steps=2", "stage.eval_every_steps=1", "stage.learning_rate=1e-2")
REPLIES = ("stage.eval_generations=2", "stage.eval_generation_tokens=7")


def build(workspace: Path, stage: str, layout: tuple[str, ...], *overrides: str) -> Path:
    """A run of two steps that is trained once."""
    config = typed_run(workspace, f"stage={stage}", *RUN, *layout, *overrides)

    def train(folder: Path) -> None:
        codes = [finish_run(config, folder)] if not layout else finish_workers(config, folder)
        assert set(codes) == {0}

    name = "-".join([stage, config.hardware.strategy.name, "replies" if config.stage.eval_generations else "mute"])
    return build_once(workspace / f"generations-{name}", train)


def replies(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder) if row["kind"] == "reply"]


def without_step(rows: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The replies of a step as evaluation.json has them."""
    return [{k: v for k, v in row.items() if k not in ("kind", "step")} for row in rows if row["step"] == step]


@pytest.mark.parametrize(
    ("stage", "layout"), [("sft", ()), ("pretrain", DDP), ("pretrain", FSDP)], ids=["single", "ddp", "fsdp"]
)
def test_a_run_that_replies_trains_to_the_last_bit_what_one_that_does_not_trains(stage, layout, workspace):
    """Dropout is on: a draw of random numbers, or a model left out of training mode, would change the next step."""
    assert "lora.dropout=0.1" in SMALL
    mute, talking = build(workspace, stage, layout), build(workspace, stage, layout, *REPLIES)
    assert losses(talking) == losses(mute) and len(losses(mute)) == 2
    assert adapter_sha256(talking) == adapter_sha256(mute)
    assert not replies(mute)
    assert [row["step"] for row in replies(talking)] == [step for step in range(3) for _ in range(4)]
    assert [row["language"] for row in replies(talking)] == ["zh", "zh", "en", "en"] * 3


@pytest.mark.parametrize(
    ("stage", "layout"), [("sft", ()), ("pretrain", DDP), ("pretrain", FSDP)], ids=["single", "ddp", "fsdp"]
)
def test_replies_are_those_of_the_engine_before_training_and_after(stage, layout, workspace):
    run, base = build(workspace, stage, layout, *REPLIES), workspace / "models" / "tiny"
    for step, engine in (
        (0, LlamaEngine(base, "", use_lora=False, quantization="nf4", dtype="float32", device="cpu")),
        (2, LlamaEngine(run / "adapter", base, dtype="float32", device="cpu")),
    ):
        expected = list(generate(engine, stage == "sft", max_new_tokens=7))
        chosen = [row for language in ("zh", "en") for row in [r for r in expected if r["language"] == language][:2]]
        assert without_step(replies(run), step) == chosen


def test_means_over_replies_are_compared_with_what_else_an_evaluation_measures(workspace):
    run = build(workspace, "sft", (), *REPLIES)
    values = evaluated_values(run)
    assert list(values) == [0, 1, 2]
    for language in ("zh", "en"):
        own = [row for row in replies(run) if row["step"] == 2 and row["language"] == language]
        for measure in ("language_share", "repetition"):
            assert values[2][f"eval/generations/{language}/{measure}"] == sum(row[measure] for row in own) / 2
    assert "eval/loss" in values[2]


def test_there_are_as_many_prompts_of_each_language_as_may_be_asked_for():
    languages = [prompt.language for prompt in read_prompts()]
    assert min(languages.count(language) for language in set(languages)) == MOST_PROMPTS
