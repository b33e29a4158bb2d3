"""The budget from which a new vocabulary pays: where two recipes of benchmarks/recipes.py meet on held-out Chinese.

    python benchmarks/vocabulary_pays.py models/smollm2_135m ours_8000_16bit no_vocabulary_16bit
        [--folder outputs/recipes] [--characters 10000]

Of every budget in processor seconds at which both were trained (seed 1), the two are evaluated side by side, so that
the error is that of their difference over documents. A line through the differences over the logarithm of the budget
is followed to zero; its range is that of lines through differences that are drawn within their errors. It is an
extrapolation: the farther from the budgets, the less it is worth.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recipes import Budget, call, read_lines, read_recipes

DRAWS = 10_000


def main() -> None:
    """Evaluate what is missing, then tell the differences and where they end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("new")
    parser.add_argument("old")
    parser.add_argument("--folder", type=Path, default=Path("outputs/recipes"))
    parser.add_argument("--characters", type=int, default=20_000)
    options = parser.parse_args()
    budgets = find_budgets(read_lines(options.folder / "results.jsonl"), options.new, options.old)
    if len(budgets) < 3:
        raise SystemExit(f"{len(budgets)} budgets have both recipes; train them with benchmarks/recipes.py at three.")
    differences = [compare(options, budget) for budget in budgets]
    for budget, (difference, error) in zip(budgets, differences, strict=True):
        print(f"{budget}: {difference:+.3f} ± {error:.3f} bits per character")
    at, low, high = find_crossing([budget.amount for budget in budgets], *zip(*differences, strict=True))
    print(f"the two meet at {at:,.0f} s (90%: {low:,.0f} to {high:,.0f} s)")


def find_budgets(lines: list[dict[str, Any]], new: str, old: str) -> list[Budget]:
    """Those in seconds at which both recipes were trained with the first seed, the smallest first."""
    of_each = [
        {
            line["budget"]
            for line in lines
            if line["recipe"] == name and line["seed"] == 1 and line["clock"] == "processor"
        }
        for name in (new, old)
    ]
    return sorted(map(Budget.parse, set.intersection(*of_each)), key=lambda budget: budget.amount)


def compare(options: argparse.Namespace, budget: Budget) -> tuple[float, float]:
    """By how many bits per character the new recipe is behind at a budget, and the standard error of that."""
    recipes = read_recipes([options.old, options.new])
    models = [
        f"{options.folder / 'bases' / name if recipes[name]['extend'] else options.base}"
        f"+{options.folder / 'runs' / f'{name}-1-{budget}-processor' / 'adapter'}"
        for name in (options.old, options.new)
    ]
    file = options.folder / "evaluations" / f"{options.old}-{options.new}-{budget}.json"
    if not file.is_file():
        call(
            "evaluate", f"models=[{','.join(models)}]", f"files=[{options.folder / 'text' / 'held_out_zh.jsonl'}]",
            "parts=[text]", f"characters={options.characters}", f"output={file}",
        )  # fmt: skip
    (row,) = json.loads(file.read_text(encoding="utf-8"))["models"][1]["text"]
    return row["bits_per_character_difference"], row["bits_per_character_difference_error"]


def find_crossing(
    budgets: list[float], differences: tuple[float, ...], errors: tuple[float, ...]
) -> tuple[float, float, float]:
    """Where the line through the differences over ln(budget) is zero, and the middle 90% of where it could be.

    Infinite where the differences do not fall.
    """
    drawn = np.random.default_rng(0).normal(differences, errors, (DRAWS, len(errors)))
    slopes, starts = np.polyfit(np.log(budgets), np.vstack([differences, drawn]).T, 1, w=1 / np.array(errors))
    with np.errstate(over="ignore"):
        at = np.where(slopes < 0, np.exp(-starts / np.minimum(slopes, -math.ulp(0.0))), math.inf)
    return float(at[0]), *(float(each) for each in np.quantile(at[1:], [0.05, 0.95], method="nearest"))


if __name__ == "__main__":
    main()
