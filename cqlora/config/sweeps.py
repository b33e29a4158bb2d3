"""The keys under `sweep`: how the runs of a sweep are compared, and how a search goes on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from cqlora.config.checks import check_fields, require_positive, require_range, require_used
from cqlora.config.choices import LANGUAGES, Goal, Pruner
from cqlora.errors import ConfigError
from cqlora.system.metrics import MEAN_LOSS, MEASURES, REPLY_MEASURES

PROBED = tuple(
    f"eval/probe/translation/{language}/{measure}"
    for language in ("zh", "en")
    for measure in ("gain", "loss", "first_loss")
)
"""What stage.eval_probe measures."""
REPLIED = tuple(f"eval/generations/{language}/{measure}" for language in ("zh", "en") for measure in REPLY_MEASURES)
"""What stage.eval_generations measures."""
EVALUATED = "evaluation/"
"""What the metrics begin with that are measured when a run has ended, as `cqlora evaluate` does."""


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """How the runs of a sweep are compared, and how a search goes on."""

    resume: str = ""
    """Folder of a sweep to go on with, by its own overrides: what is missing, has failed or was interrupted runs."""
    objectives: list[str] = field(default_factory=lambda: ["eval/loss"])
    """Metrics to compare runs by, the first one first, such as `[eval/wiki_zh/zh/bits_per_character]`; less is better
    unless it is written METRIC:maximize, as in `eval/probe/translation/zh/gain:maximize` with stage.eval_probe=true."""
    evaluate: list[str] = field(default_factory=list)
    """What of `cqlora evaluate` measures the objectives that begin with `evaluation/`, when a run has ended: its own
    overrides, such as `['files=[held_out.txt]','tasks=[ceval]']`."""
    trials: int = 20
    """Search only: trials in all, those of every process that shares the folder."""
    startup_trials: int = 10
    """Search only: trials at random before TPE proposes."""
    at_once: int = 1
    """Search only: trials that are submitted together, for launchers that run jobs elsewhere."""
    pruner: Pruner = Pruner.none
    """Search only: median ends a trial whose evaluation is worse than the median of earlier trials at that step."""
    prune_after_trials: int = 4
    """Search only: trials that run to their end before any is pruned."""
    seed: int = 1
    """Search only: of what is proposed."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("resume",))
        if self.resume:
            raise ConfigError(
                "sweep.resume stands for a sweep's overrides on the command line of cqlora.run; leave it out here."
            )
        require_positive(self, "trials", "at_once", "prune_after_trials")
        goals = [goal for _, colon, goal in (each.partition(":") for each in self.objectives) if colon]
        if unknown := set(goals) - set(Goal.__members__):
            raise ConfigError(f"sweep.objectives has the goal {min(unknown)}; use minimize or maximize.")
        if not self.objectives or not all(each.partition(":")[0] for each in self.objectives):
            raise ConfigError("sweep.objectives names no metric; use [eval/loss], or leave it out.")
        metrics = [each.partition(":")[0] for each in self.objectives]
        if twice := next((each for each in metrics if metrics.count(each) > 1), None):
            raise ConfigError(f"sweep.objectives names {twice} twice; name each metric once.")
        require_range("sweep.startup_trials", self.startup_trials, 0, 1_000_000)
        require_range("sweep.seed", self.seed, 0, 2**31 - 1)
        require_used(self, "prune_after_trials", self.pruner is not Pruner.none, "sweep.pruner=median")
        require_used(self, "evaluate", bool(self.evaluated), f"an objective that begins with {EVALUATED}")
        if self.pruner is not Pruner.none and len(self.objectives) > 1:
            raise ConfigError("sweep.pruner=median goes by one number and sweep.objectives has several; leave one out.")
        if self.pruner is not Pruner.none and self.evaluated:
            raise ConfigError(
                f"sweep.pruner=median goes by evaluations in training and {self.evaluated[0]} is measured after it; "
                "leave the pruner out."
            )

    @property
    def goals(self) -> dict[str, Goal]:
        """Metric → goal, in the order of the objectives."""
        parts = [each.partition(":") for each in self.objectives]
        return {metric: Goal[goal or "minimize"] for metric, _, goal in parts}

    @property
    def evaluated(self) -> list[str]:
        """The objectives that are measured when a run has ended."""
        return [metric for metric in self.goals if metric.startswith(EVALUATED)]

    def require_search(self, searched: bool) -> None:
        """Raise ConfigError for a key that would have no effect outside a search."""
        for key in ("trials", "startup_trials", "at_once", "pruner", "seed"):
            require_used(self, key, searched, "hydra/sweeper=optuna and --multirun")


def check_measured(sweep: SweepConfig, data: Any, stage: Any) -> None:
    """Raise ConfigError for an objective that no run of this data and stage, typed or composed, measures."""
    languages = {
        name: (source.language,) if source.language else LANGUAGES
        for name, source in data.sources.items()
        if stage.name in source.stages
    }
    optional = {"stage.eval_probe=true": (PROBED, stage.eval_probe)}
    optional["stage.eval_generations=2"] = (REPLIED, stage.eval_generations > 0)
    known = [MEAN_LOSS, *(metric for metrics, measured in optional.values() if measured for metric in metrics)]
    for source, spoken in languages.items():
        known += [f"eval/{source}/{language}/{measure}" for language in spoken for measure in MEASURES]
    for metric in sweep.goals:
        asked = next((words for words, (metrics, _) in optional.items() if metric in metrics), None)
        if asked is not None and metric not in known:
            raise ConfigError(f"sweep.objectives names {metric}, which is measured with {asked}; add it.")
        if not metric.startswith(EVALUATED):
            require_metric(metric, known)


def require_metric(metric: str, known: Sequence[str], hint: str = "") -> None:
    """Raise ConfigError for a metric that is none of those that are known; `hint` is told where none is near."""
    if metric in known:
        return
    near = get_close_matches(metric, known, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else hint or f"use one such as {known[0]} or {known[-1]}."
    raise ConfigError(f"sweep.objectives names {metric}, which no run here measures; {hint}")
