"""Objectives that `cqlora evaluate` measures: known before the first job, measured after each, its own numbers."""

import json
from pathlib import Path

import pytest

from cqlora.config.sweeps import SweepConfig
from cqlora.errors import ConfigError, CqloraError
from cqlora.evaluation import EvaluateConfig, evaluate_models
from cqlora.launch.objectives import check_evaluated, find_reason, list_known, list_words
from cqlora.sweep.measures import name_measures
from cqlora.sweep.trials import read_trials
from cqlora.system.metrics import read_metrics
from tests.conftest import run_verb
from tests.launch.test_sweeps import command

HELD_OUT = {"river_zh": "长江是亚洲最长的河流。河水很多。", "river_en": "The longest river is in Asia. It is long."}


@pytest.fixture
def files(tmp_path) -> list[str]:
    for name, text in HELD_OUT.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    return [str(tmp_path / f"{name}.txt") for name in HELD_OUT]


def settings(*objectives: str, evaluate: tuple[str, ...] = ()) -> SweepConfig:
    return SweepConfig(objectives=list(objectives), evaluate=list(evaluate))


def test_the_names_that_are_known_before_are_those_that_are_measured_after(workspace, files, tmp_path):
    """A job's numbers are in its trial, and are those of an evaluation of its adapter that is made here."""
    objectives = [
        "evaluation/text/river_zh/zh/bits_per_character", "evaluation/generations/en/language_share:maximize",
        "eval/loss",
    ]  # fmt: skip
    words = [f"files=[{','.join(files)}]", "max_new_tokens=2"]
    swept = command(
        workspace, "lora.rank=2", f"sweep.objectives=[{','.join(objectives)}]",
        f"sweep.evaluate=[{','.join(map(repr, words))}]", "hydra.sweep.dir=swept", "--multirun",
    )  # fmt: skip
    told = run_verb(tmp_path, "run", *swept)
    (trial,) = read_trials(tmp_path / "swept")
    assert trial.state == "finished", trial.error
    measured = {name: value for name, value in trial.values.items() if name.startswith("evaluation/")}
    assert list(measured) == list_known(tuple(list_words(settings(*objectives, evaluate=tuple(words)))))
    model = f"{workspace}/models/tiny+{tmp_path}/swept/0/adapter"
    here = evaluate_models(EvaluateConfig(models=[model], files=files, max_new_tokens=2, parts=["text", "generations"]))
    assert measured == pytest.approx(name_measures(here["models"][0]))
    assert f"{measured['evaluation/text/river_zh/zh/bits_per_character']:.4f}" in told.stdout
    assert read_metrics(tmp_path / "swept" / "0")[-1]["kind"] == "evaluation"
    page = (tmp_path / "swept" / "0" / "report.html").read_text(encoding="utf-8")
    assert '"language_share"' in page, "the page was written when its evaluation was there"


def test_what_is_not_measured_is_refused_with_what_is(files, tmp_path):
    words = (f"files=[{files[0]}]",)
    check_evaluated(settings("evaluation/text/river_zh/zh/loss", "evaluation/generations/zh/ended", evaluate=words))
    for metric, told in {
        "evaluation/text/river_zh/zh/los": r"did you mean evaluation/text/river_zh/zh/loss\?",
        "evaluation/text/lake/zh/loss": "which no run here measures; did you mean evaluation/text/river_zh/zh/loss",
        "evaluation/text/river_zh/en/loss": "no run here measures",
        "evaluation/text/x": "it is none of evaluation/text/river_zh/zh/loss, evaluation/text/river_zh/zh/perplexity, ",
    }.items():
        with pytest.raises(ConfigError, match=told):
            check_evaluated(settings(metric, evaluate=words))
    with pytest.raises(ConfigError, match="did you mean evaluation/generations/zh/ended"):
        check_evaluated(settings("evaluation/generations/fr/ended"))
    with pytest.raises(
        ConfigError, match=r"begin with one of evaluation/text/, .*evaluation/choice/ and sweep\.evaluate"
    ):
        check_evaluated(settings("evaluation/nothing"))
    with pytest.raises(ConfigError, match=r"nothing says which text; add sweep\.evaluate=\['files=\[FILE\]'\]"):
        check_evaluated(settings("evaluation/text/sample_zh/zh/loss"))


def test_words_of_an_evaluation_are_checked_as_its_own(files):
    objective = "evaluation/generations/zh/ended"
    for word, told in {
        "max_new_tokns=4": r"sweep\.evaluate: .*max_new_tokens",
        "max_new_tokens=0": r"sweep\.evaluate: max_new_tokens=0 must be above 0",
        "base=models/tiny": "has base=models/tiny, which is no KEY=VALUE of what",
        "output=x.json": "has output=x.json",
        "hydra.run.dir=x": r"has hydra\.run\.dir=x",
        "--help": "has --help",
    }.items():
        with pytest.raises(ConfigError, match=told):
            check_evaluated(settings(objective, evaluate=(word,)))
    with pytest.raises(ConfigError, match="has no effect without an objective that begins with evaluation/"):
        settings("eval/loss", evaluate=("limit=3",))
    with pytest.raises(CqloraError, match="nowhere"):
        check_evaluated(settings("evaluation/text/nowhere/zh/loss", evaluate=("files=[nowhere.txt]",)))


def test_multiple_choice_is_named_by_task_and_shots(tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra `evaluation`")
    from tests.evaluation.test_choice import write_benchmark

    words = ("tasks=[ceval]", "shots=[0,2]", f"ceval.root={write_benchmark('ceval', tmp_path)}")
    check_evaluated(settings("evaluation/choice/ceval/2/micro:maximize", evaluate=words))
    with pytest.raises(ConfigError, match="did you mean evaluation/choice/ceval/2/micro"):
        check_evaluated(settings("evaluation/choice/ceval/5/micro:maximize", evaluate=words))


def test_the_agent_and_the_pruner_go_by_what_training_measures(monkeypatch):
    with pytest.raises(ConfigError, match="is measured after it; leave the pruner out"):
        SweepConfig(objectives=["evaluation/generations/zh/ended"], pruner="median")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    with pytest.raises(ConfigError, match="use a metric that begins with eval/"):
        check_evaluated(settings("evaluation/generations/zh/ended"))


def test_an_evaluation_that_fails_is_told_in_its_own_words(tmp_path):
    log: Path = tmp_path / "evaluation.log"
    log.write_text("loading\nerror: the folder is damaged.\nnote: 3\n")
    assert find_reason(log) == "the evaluation after training failed: the folder is damaged."
    log.write_text("Killed\n")
    assert find_reason(log).endswith(f"its last words are in {log}")


def test_numbers_that_are_not_finite_are_left_out():
    model = json.loads('{"text": [{"source": "a", "language": "zh", "loss": 800, "perplexity": null, '
                       '"bits_per_character": 2, "bits_per_byte": 1}]}')  # fmt: skip
    assert list(name_measures(model)) == [
        f"evaluation/text/a/zh/{each}" for each in ("loss", "bits_per_character", "bits_per_byte")
    ]
