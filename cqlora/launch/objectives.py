"""Objectives that `cqlora evaluate` measures of what a run has trained: checked before the run, measured after it."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import open_dict

from cqlora.config.choices import LANGUAGES
from cqlora.config.composition import compose_alone
from cqlora.config.diagnosis import to_schema
from cqlora.config.schema import RunConfig
from cqlora.config.sweeps import EVALUATED, SweepConfig, require_metric
from cqlora.data.held_out import read_files
from cqlora.errors import ConfigError, error_of_code
from cqlora.evaluation.choice import check_tasks
from cqlora.evaluation.config import PARTS, EvaluateConfig
from cqlora.evaluation.generations import read_prompts
from cqlora.evaluation.probe import list_patterns
from cqlora.launch.processes import WORKERS_FOLDER
from cqlora.report.runs import EVALUATION_FILE, to_override
from cqlora.sweep.measures import list_measures, name_measures
from cqlora.system.documents import read_object
from cqlora.system.metrics import append_metrics, read_metrics

_OWN = ("base", "adapter", "models", "run", "checkpoint", "output", "hydra")
"""Of `evaluate`: what follows from the run."""


def check_evaluated(settings: SweepConfig) -> None:
    """Raise ConfigError, before anything is trained, for an objective that sweep.evaluate does not measure."""
    if not settings.evaluated:
        return
    if "WANDB_SWEEP_ID" in os.environ:
        raise ConfigError(
            f"sweep.objectives names {settings.evaluated[0]}, and W&B's agent compares runs by what they log in "
            "training; use a metric that begins with eval/."
        )
    known = list_known(tuple(list_words(settings)))
    for metric in settings.evaluated:
        require_metric(metric, known, f"it is none of {', '.join(known)}.")


def list_words(settings: SweepConfig) -> list[str]:
    """The overrides of `cqlora evaluate`, with the parts that the objectives name.

    Raises:
        ConfigError: a word that is no override, or that says what follows from the run.
    """
    keys = [word.partition("=")[0] for word in settings.evaluate]
    for key, word in zip(keys, settings.evaluate, strict=True):
        if "=" not in word or key.lstrip("+~").partition(".")[0] in _OWN:
            raise ConfigError(
                f"sweep.evaluate has {word}, which is no KEY=VALUE of what `cqlora evaluate` measures; leave it out."
            )
    parts = [part for part in PARTS if any(metric.startswith(f"{EVALUATED}{part}/") for metric in settings.evaluated)]
    return [*settings.evaluate, *([] if "parts" in keys else [f"parts={to_override(parts)}"])]


@cache
def list_known(words: tuple[str, ...]) -> list[str]:
    """The metrics that an evaluation by these words gives.

    Raises:
        ConfigError: they are no configuration of `evaluate`, or nothing says which text is scored.
        DataError: files that cannot be read.
    """
    config = compose_evaluation(words)
    check_tasks(config.tasks, config.roots)
    model: dict[str, list[dict[str, Any]]] = {}
    if "text" in config.parts:
        model["text"] = [*list_texts(config)]
    if "probe" in config.parts:
        model["probe"] = [{"pattern": pattern.name, "language": pattern.language} for pattern in list_patterns()]
    if "generations" in config.parts:
        model["generations"] = [{"language": prompt.language} for prompt in read_prompts()]
    model["choice"] = [{"task": task, "shots": shots} for task in config.tasks for shots in config.shots]
    return [name for name, _, _ in list_measures(model)]


def compose_evaluation(words: tuple[str, ...]) -> EvaluateConfig:
    """The evaluation of some model by these words.

    Raises:
        ConfigError: they are none.
    """
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    if list(words) == ["parts=[]"]:
        parts = ", ".join(f"{EVALUATED}{part}/" for part in PARTS)
        raise ConfigError(
            f"sweep.objectives names nothing that `cqlora evaluate` measures; begin with one of {parts}, or with "
            f"{EVALUATED}choice/ and sweep.evaluate=['tasks=[ceval]']."
        )
    try:
        with compose_alone("evaluate", EvaluateConfig, ["base=BASE", *words]) as composed:
            with open_dict(composed):
                del composed["hydra"]
            config: EvaluateConfig = to_schema(composed, EvaluateConfig)
    except ConfigError as error:
        raise ConfigError(f"sweep.evaluate: {error}") from error
    return config


def list_texts(config: EvaluateConfig) -> list[dict[str, str]]:
    """Source and language of what is scored; of a data group, of what may be."""
    if config.data is not None:
        return [
            {"source": name, "language": language}
            for name, source in config.data.sources.items()
            for language in ((source.language,) if source.language else LANGUAGES)
        ]
    if not config.files:
        raise ConfigError(
            f"sweep.objectives names {EVALUATED}text/… and nothing says which text; add "
            "sweep.evaluate=['files=[FILE]'], or use eval/SOURCE/LANGUAGE/bits_per_character, which training measures."
        )
    return [
        {"source": text.source, "language": text.language}
        for text in read_files(config.files, config.separator, config.characters)
    ]


def measure_objectives(config: RunConfig, run_folder: Path) -> None:
    """Measure what a run has trained in a process of its own, and add the numbers to its metrics.jsonl.

    Raises:
        CqloraError: the evaluation's own error.
    """
    if not config.sweep.evaluated or config.stage.find_learning_rate:
        return
    model = f"{config.model.path}+{run_folder / 'adapter'}"
    output = run_folder / EVALUATION_FILE
    log = run_folder / WORKERS_FOLDER / "evaluation.log"
    log.parent.mkdir(exist_ok=True)
    own = [
        f"models={to_override([model])}",
        f"output={to_override(str(output))}",
        f"hydra.run.dir={to_override(str(run_folder))}",
    ]
    print(f"evaluating {run_folder} (log: {log})", file=sys.stderr, flush=True)
    with log.open("wb") as stream:
        # Ended with this process where a signal ends it; torch's memory goes with it.
        done = subprocess.run(
            [sys.executable, "-m", "cqlora.evaluate", *list_words(config.sweep), *own],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, check=False,
        )  # fmt: skip
    if done.returncode:
        raise error_of_code(done.returncode, find_reason(log))
    (measured,) = read_object(output)["models"]
    step = max((row["step"] for row in read_metrics(run_folder)), default=0)
    numbers = {name.removeprefix(EVALUATED): value for name, value in name_measures(measured).items()}
    append_metrics(run_folder, {"kind": "evaluation", "step": step, **numbers})


def find_reason(log: Path) -> str:
    """Why an evaluation failed, in its own words."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
    return f"the evaluation after training failed: {told or f'its last words are in {log}'}"
