"""What each part of the engine buys: milliseconds a step with it and without, one conversation and eight.

    python benchmarks/engine_parts.py --base models/smollm2_135m --adapter FOLDER [--steps 60]

All variants are loaded in one process and step in turn, so that whatever else the machine does falls on all; the
least time of each is what the machine can do, the median what it did. A random adapter is made where none is given.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from benchmarks.engine import QUESTIONS, write_random_adapter
from cqlora.engine import LlamaEngine
from cqlora.inference.batch import ContinuousBatch
from cqlora.inference.requests import Sampling


def main() -> None:
    """Load, step in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("models/smollm2_135m"))
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    if options.adapter is None:
        options.adapter = options.base.with_name(f"{options.base.name}_adapter")
        if not options.adapter.exists():
            write_random_adapter(options.base, options.adapter)
    engines = load_engines(options.base, options.adapter)
    for count in (1, 8):
        batches = {name: open_batch(engine, count, options.steps) for name, engine in engines.items()}
        batches["adapter on NF4, replies one by one"] = alone = open_batch(
            engines["adapter on NF4"], count, options.steps
        )
        alone._shelf.arrange = lambda caches: None
        batches["adapter on NF4, seeded"] = open_batch(engines["adapter on NF4"], count, options.steps, seed=1)
        for name, seconds in step_in_turn(batches, options.steps).items():
            least, usual = 1e3 * min(seconds), 1e3 * statistics.median(seconds)
            print(f"{count} {name:45} {least:7.1f} ms least, {usual:7.1f} median, {count / min(seconds):6.1f} tokens/s")


def load_engines(base: Path, adapter: Path) -> dict[str, LlamaEngine]:
    """The engine as it comes, and with one part of it hidden."""
    engines = {"adapter on NF4": nf4(base, adapter), "merged, bfloat16": merged(base, "bfloat16")}
    with mock.patch("cqlora.inference.form.has_fused_nf4", return_value=False):
        engines["adapter on NF4, unpacked instead of fused"] = nf4(base, adapter)
    with mock.patch("cqlora.inference.linear.packs_bfloat16", return_value=False):
        engines["merged, bfloat16 not in oneDNN's order"] = merged(base, "bfloat16")
        engines["adapter on NF4, output not in oneDNN's order"] = nf4(base, adapter)
    engines["merged, float32"] = merged(base, "float32")
    for name, engine in engines.items():
        print(f"{name}: {engine.form}")
    return engines


def nf4(base: Path, adapter: Path) -> LlamaEngine:
    """A random adapter has no card to say so."""
    return LlamaEngine(adapter, base, quantization="nf4")


def merged(base: Path, dtype: str) -> LlamaEngine:
    """The base as a model of its own."""
    return LlamaEngine(base, "", use_lora=False, dtype=dtype)


def open_batch(engine: LlamaEngine, count: int, steps: int, seed: int | None = None) -> ContinuousBatch:
    """A batch of so many replies whose prompts are read."""
    batch = engine.open_batch(count)
    temperature = 0.0 if seed is None else 1.0
    sampling = Sampling(max_new_tokens=steps + 2, temperature=temperature, seed=seed, ignore_end=True)
    for question in QUESTIONS[:count]:
        batch.admit(engine.encode_messages([{"role": "user", "text": question}]), sampling)
    batch.step()
    return batch


def step_in_turn(batches: dict[str, ContinuousBatch], steps: int) -> dict[str, list[float]]:
    """Seconds of each batch's steps."""
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(steps):
        for name, batch in batches.items():
            seconds[name].append(timed(batch.step))
    return seconds


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
