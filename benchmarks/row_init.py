"""Ways to initialise new rows, by held-out bits per character at step 0 and after some steps.

    python benchmarks/row_init.py BASE CORPUS [--steps 30] [--size 8000] [--inits mean weighted]

BASE is the folder of SmolLM2 (`cqlora fetch`), CORPUS a file of Chinese text: nine tenths of it teach the pieces and
train, the rest is held out. Every way has the same pieces, text, steps and learning rates.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cqlora.vocab.config import RowInit

STEP_OPTIONS = (
    "stage=pretrain", "model=smollm2_135m", "hardware=cpu", "data=wiki_zh", "tracking=none", "data.val_fraction=0.1",
    "stage.sequence_length=256", "stage.global_batch_size=8", "hardware.micro_batch_size=4",
    "stage.learning_rate=5e-4", "stage.embeddings_learning_rate=2e-3", "stage.embeddings=new_rows",
    "stage.eval_tokens=12288", "stage.checkpoint_every_steps=1000",
)  # fmt: skip


def main() -> None:
    """Extend and train once a way; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=8000)
    parser.add_argument("--inits", nargs="+", choices=[init.name for init in RowInit], default=None)
    arguments = parser.parse_args()
    inits = arguments.inits or [init.name for init in RowInit]
    print(f"{'vocab.init':16}{'step 0':>10}{f'step {arguments.steps}':>10}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for init in inits:
            start, end = measure(arguments, init, Path(scratch))
            print(f"{init:16}{start:10.3f}{end:10.3f}", flush=True)


def measure(arguments: argparse.Namespace, init: str, scratch: Path) -> tuple[float, float]:
    """Held-out bits per Chinese-text character before and after training."""
    extended, run = scratch / init, scratch / f"{init}-run"
    call(
        "extend", f"base={arguments.base}", f"output_dir={extended}", "vocab=auto", f"vocab.init={init}",
        f"vocab.size={arguments.size}", f"vocab.corpus=[{arguments.corpus}]",
    )  # fmt: skip
    call(
        "run", *STEP_OPTIONS, f"model.path={extended}", f"data.sources.wiki_zh.path={arguments.corpus}",
        f"stage.max_steps={arguments.steps}", f"data.cache_dir={scratch / 'cache'}", f"hydra.run.dir={run}",
    )  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [row["bits_per_character"] for row in rows if row["kind"] == "eval"]
    return values[0], values[-1]


def call(verb: str, *overrides: str) -> None:
    """Run a verb; its output is shown only where it fails."""
    done = subprocess.run([sys.executable, "-m", f"cqlora.{verb}", *overrides], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


if __name__ == "__main__":
    main()
