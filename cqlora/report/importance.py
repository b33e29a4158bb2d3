"""How much of a measure's spread over a sweep's runs one setting explains by itself."""

import json
import math
from collections import defaultdict
from typing import Any

LEAST_RUNS = 10
"""Below it every number would be chance."""


def rank_importances(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By measure: `runs` that have it, and `shares` by setting, largest first; no shares below `LEAST_RUNS`."""
    measures = {key for run in runs for key in run["values"]}
    ranked: dict[str, dict[str, Any]] = {}
    for measure in sorted(measures):
        having = [run for run in runs if isinstance(run["values"].get(measure), int | float)]
        ranked[measure] = {"runs": len(having), "shares": {}}
        if len(having) >= LEAST_RUNS:
            numbers = [float(run["values"][measure]) for run in having]
            levels = {key: [run["differing"].get(key) for run in having] for run in having for key in run["differing"]}
            # What all runs have alike explains nothing, and is no candidate.
            varied = {key: found for key, found in levels.items() if any(level != found[0] for level in found)}
            shares = {key: explained_share(found, numbers) for key, found in varied.items()}
            ordered = sorted(shares.items(), key=lambda item: -item[1])
            ranked[measure]["shares"] = {key: share for key, share in ordered if math.isfinite(share)}
    return ranked


def explained_share(levels: list[Any], numbers: list[float]) -> float:
    """The share of the variance that a setting's levels explain: omega squared of a one-way analysis of variance.

    It takes off what as many levels would explain by chance (Hays 1963), so it is 0 where there is nothing, and not
    a number where every run has a level of its own. Many levels of a number are first gathered into thirds.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for level, number in zip(gather_levels(levels), numbers, strict=True):
        groups[level].append(number)
    n, k = len(numbers), len(groups)
    if k < 2 or n <= k:
        return 0.0 if k < 2 else math.nan
    mean = math.fsum(numbers) / n
    between = math.fsum(len(group) * (math.fsum(group) / len(group) - mean) ** 2 for group in groups.values())
    total = math.fsum((number - mean) ** 2 for number in numbers)
    within = (total - between) / (n - k)
    return max(0.0, (between - (k - 1) * within) / (total + within)) if total > 0 else 0.0


def gather_levels(levels: list[Any]) -> list[str]:
    """A name for each run's level; of a number with more levels than a third of the runs, the third that it is in."""
    distinct = {json.dumps(level, sort_keys=True, default=str) for level in levels}
    numbers = [level for level in levels if isinstance(level, int | float) and not isinstance(level, bool)]
    if len(numbers) < len(levels) or len(distinct) <= max(2, len(levels) // 3):
        return [json.dumps(level, sort_keys=True, default=str) for level in levels]
    ordered = sorted(numbers)
    cuts = (ordered[len(ordered) // 3], ordered[2 * len(ordered) // 3])
    return [str(sum(level >= cut for cut in cuts)) for level in numbers]
