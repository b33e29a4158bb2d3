"""A sweep's summary table: best first, the seeds of one setting gathered into mean and spread."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cqlora.config.choices import Goal
from cqlora.sweep.trials import State, Trial

SEED = "seed"


@dataclass(frozen=True, slots=True)
class Setting:
    """The trials that differ in nothing but their seed."""

    overrides: dict[str, Any]
    trials: list[Trial]

    @property
    def finished(self) -> list[Trial]:
        """Those whose numbers count."""
        return [trial for trial in self.trials if trial.state is State.finished]

    def values(self, metric: str) -> list[float]:
        """A metric of each finished trial that has it."""
        return [trial.values[metric] for trial in self.finished if metric in trial.values]

    def mean(self, metric: str) -> float | None:
        """Mean of a metric over the seeds."""
        return statistics.fmean(values) if (values := self.values(metric)) else None

    def spread(self, metric: str) -> float | None:
        """Sample standard deviation over the seeds; None for less than two."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def state(self) -> str:
        """`finished`, or what became of how many."""
        counts = {state: sum(trial.state is state for trial in self.trials) for state in State}
        told = {state.value: count for state, count in counts.items() if count}
        return next(iter(told)) if len(told) == 1 else ", ".join(f"{count} {state}" for state, count in told.items())


def gather_settings(trials: list[Trial], objectives: Mapping[str, Goal]) -> list[Setting]:
    """The settings of a sweep, the best by the first objective first, those without a number last."""
    settings: dict[tuple[tuple[str, str], ...], Setting] = {}
    for trial in trials:
        own = {key: value for key, value in trial.overrides.items() if key != SEED}
        key = tuple(sorted((name, repr(value)) for name, value in own.items()))
        settings.setdefault(key, Setting(own, [])).trials.append(trial)
    metric, goal = next(iter(objectives.items()))
    sign = 1 if goal is Goal.minimize else -1

    def rank(setting: Setting) -> tuple[bool, float]:
        mean = setting.mean(metric)
        return mean is None, 0.0 if mean is None else sign * mean

    return sorted(settings.values(), key=rank)


def find_front(settings: list[Setting], objectives: Mapping[str, Goal]) -> list[Setting]:
    """The settings that no other beats in one objective without losing in another (the Pareto front)."""
    signs = {metric: 1 if goal is Goal.minimize else -1 for metric, goal in objectives.items()}
    points: list[tuple[Setting, list[float]]] = []
    for setting in settings:
        means = [setting.mean(metric) for metric in signs]
        numbers = [sign * mean for sign, mean in zip(signs.values(), means, strict=True) if mean is not None]
        if len(numbers) == len(signs):
            points.append((setting, numbers))
    return [
        setting
        for setting, own in points
        if not any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for _, other in points)
    ]


def varying_keys(trials: list[Trial]) -> list[str]:
    """Overrides whose values are not the same in all trials, in the order in which they were typed; no seed."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.overrides if key != SEED))
    return [key for key in keys if len({repr(trial.overrides.get(key)) for trial in trials}) > 1]


def render_summary(trials: list[Trial], objectives: Mapping[str, Goal]) -> str:
    """The table as text: a line a setting, with what varies, each objective, and the numbers of its jobs."""
    settings = gather_settings(trials, objectives)
    front = find_front(settings, objectives) if len(objectives) > 1 else []
    keys = varying_keys(trials)
    head = [*keys, *(f"{metric} ({goal.name})" for metric, goal in objectives.items()), "state", "jobs"]
    rows = [
        [
            *(str(setting.overrides.get(key, "")) for key in keys),
            *(show_value(setting, metric) for metric in objectives),
            setting.state + (" *" if setting in front else ""),
            ",".join(str(trial.number) for trial in setting.trials),
        ]
        for setting in settings
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    note = ["* no other setting is better in one objective without being worse in another"] if front else []
    return "\n".join(line.rstrip() for line in [*lines, *note])


def show_value(setting: Setting, metric: str) -> str:
    """`2.3456`, or with several seeds `2.3456 ± 0.0123`."""
    mean, spread = setting.mean(metric), setting.spread(metric)
    if mean is None:
        return "-"
    return f"{mean:.4f}" if spread is None else f"{mean:.4f} ± {spread:.4f}"
