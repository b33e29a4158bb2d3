"""An adapter merged at several weights, each scored: Chinese against English, and the Pareto front of the two.

    python benchmarks/adapter_weight.py BASE ADAPTER HELD_OUT_ZH HELD_OUT_EN [--weights 0.5 0.6 0.7 0.8 0.9 1.0]

HELD_OUT_ZH and HELD_OUT_EN are text that the adapter was not trained on. On the front (`*`) are the weights to which no
other is better in both languages (2407.08699, which averages models for the same trade).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

Score = tuple[float, float]
"""Bits per character of Chinese, bits per byte of English."""


def main() -> None:
    """Merge and score once a weight; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("held_out", type=Path, nargs=2)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    parser.add_argument("--characters", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scores = {weight: measure(options, weight, Path(scratch)) for weight in [0.0, *options.weights]}
    front = find_front(scores)
    print(f"{'adapter_weight':16}{'Chinese bits/character':>24}{'English bits/byte':>20}")
    for weight, (chinese, english) in scores.items():
        print(f"{weight or 'untouched base':<16}{chinese:24.3f}{english:20.3f}{' *' if weight in front else ''}")


def measure(options: argparse.Namespace, weight: float, scratch: Path) -> Score:
    """The score at a weight; 0 is the base."""
    model, record = scratch / "merged", scratch / "evaluation.json"
    if weight:
        call("merge", f"base={options.base}", f"adapter={options.adapter}", f"adapter_weight={weight}",
             f"output_dir={model}")  # fmt: skip
    call("evaluate", f"models=[{model if weight else options.base}]", f"files=[{','.join(map(str, options.held_out))}]",
         "parts=[text]", f"characters={options.characters}", f"output={record}")  # fmt: skip
    chinese, english = json.loads(record.read_text(encoding="utf-8"))["models"][0]["text"]
    shutil.rmtree(model, ignore_errors=True)
    return chinese["bits_per_character"], english["bits_per_byte"]


def find_front(scores: dict[float, Score]) -> list[float]:
    """The weights to which no other is at least as good in both languages and better in one."""

    def beats(other: Score, score: Score) -> bool:
        return other != score and other[0] <= score[0] and other[1] <= score[1]

    return [weight for weight, score in scores.items() if not any(beats(other, score) for other in scores.values())]


def call(verb: str, *overrides: str) -> None:
    """Run a verb; its output is shown only where it fails."""
    done = subprocess.run([sys.executable, "-m", f"cqlora.{verb}", *overrides], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


if __name__ == "__main__":
    main()
