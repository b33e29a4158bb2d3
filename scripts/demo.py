"""`make demo`: a real pretrained model gets Chinese words and learns from the bundled sample, on this processor."""

import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table

from cqlora.base import read_base
from cqlora.config.run_yaml import load_run_yaml
from cqlora.data.cache import prepare_cache
from cqlora.data.sources import SAMPLE_DIR
from cqlora.system.metrics import read_metrics
from cqlora.system.progress import open_console

BASE = Path("models/smollm2_135m")
EXTENDED = Path("models/smollm2_135m_demo")
RUNS = Path("outputs/demo")
PIECES = 1000
"""As many as 40,000 characters of text can teach well; a corpus of your own supports tens of thousands."""


def main() -> None:
    """Fetch, extend, measure the base, train, and print what it bought."""
    started = time.monotonic()
    call("fetch", f"output_dir={BASE}")
    if not (EXTENDED / "config.json").is_file():
        corpus = SAMPLE_DIR / "sample_zh" / "train.jsonl"
        call(
            "extend",
            "vocab=auto",
            f"base={BASE}",
            f"output_dir={EXTENDED}",
            f"vocab.size={PIECES}",
            f"vocab.corpus=[{corpus}]",
        )
    folder = RUNS / time.strftime("%Y-%m-%d_%H-%M-%S")
    before = train(BASE, folder / "base", "stage.max_steps=1", "stage.eval_every_steps=1")
    after = train(EXTENDED, folder / "trained", "stage.learning_rate=5e-4", "stage.embeddings_learning_rate=2e-3")
    show(before, after, (time.monotonic() - started) / 60)


def call(verb: str, *arguments: str) -> None:
    """Run a verb as a user would, its output on the terminal."""
    print(f"$ cqlora {verb} {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", f"cqlora.{verb}", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def train(model: Path, folder: Path, *overrides: str) -> Path:
    """One pretraining run on the bundled sample; its folder."""
    common = ("stage=pretrain", "model=smollm2_135m", f"model.path={model}", "data=sample", "hardware=cpu")
    call("run", *common, "tracking=none", "stage.eval_tokens=0", f"hydra.run.dir={folder}", *overrides)
    return folder


def show(before: Path, after: Path, minutes: float) -> None:
    """The table: the untouched base against the extended and trained one."""
    console = open_console()
    table = Table(title="SmolLM2-135M, held-out text of the bundled sample")
    for name in ("", "base", "extended, untrained", "extended, trained"):
        table.add_column(name, justify="right" if name else "left")
    base, start, end = held_out(before, first=True), held_out(after, first=True), held_out(after, first=False)
    for language, language_name in (("zh", "Chinese"), ("en", "English")):
        cells = [f"{values[language]:.3f}" for values in (base, start, end)]
        table.add_row(f"{language_name} bits per character", *cells)
    tokens = [f"{tokens_per_character(folder):.3f}" for folder in (before, after, after)]
    table.add_row("tokens per Chinese character", *tokens)
    steps = [row for row in read_metrics(after) if row["kind"] == "train"]
    seconds = sum(row["seconds"] for row in steps)
    table.add_row("tokens per second", "", "", f"{steps[-1]['tokens'] / seconds:,.0f}")
    table.add_row("peak memory, GiB", "", "", f"{max(row['peak_memory_gib'] for row in steps):.2f}")
    table.add_row("minutes in all", "", "", f"{minutes:.1f}")
    console.print(table)
    console.print(
        f"base     {EXTENDED}\nadapter  {after / 'adapter'}\nmetrics  {after / 'metrics.jsonl'}", soft_wrap=True
    )


def held_out(folder: Path, first: bool) -> dict[str, float]:
    """Bits per character of each language at a run's first or last evaluation."""
    rows = [row for row in read_metrics(folder) if row["kind"] == "eval"]
    step = rows[0 if first else -1]["step"]
    return {row["language"]: row["bits_per_character"] for row in rows if row["step"] == step}


def tokens_per_character(run: Path) -> float:
    """Tokens per Chinese character of the run's text."""
    config = load_run_yaml(run / "run.yaml")
    summary = prepare_cache(config, read_base(config.model.path)).summary
    return float(summary["sources"]["sample_zh"]["tokens_per_chinese_character"])


if __name__ == "__main__":
    main()
