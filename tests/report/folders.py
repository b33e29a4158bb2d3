"""Folders as runs and sweeps leave them, made of numbers that a test knows."""

import json
import math
import random
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from cqlora.config.diagnosis import to_schema
from cqlora.config.run_yaml import write_run_yaml
from cqlora.config.schema import CONFIG_DIR, RunConfig, register_schemas
from cqlora.launch.settle import look_ahead, settle


def write_run(
    folder: Path, overrides: tuple[str, ...] = (), steps: int = 60, seed: int = 1, ended: bool = True
) -> Path:
    """A run of `steps` steps with evaluations of two sources at its beginning and end."""
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        config = to_schema(compose("config", ["stage=pretrain", *overrides]), RunConfig)
    write_run_yaml(settle(config, look_ahead(config)), folder)
    rows = [*evaluations(0, 4.0), *(training(step, seed) for step in range(1, steps + 1)), *evaluations(steps, 3.5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if ended:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


def training(step: int, seed: int) -> dict[str, Any]:
    """One training line."""
    noise = random.Random(seed * 100_003 + step).random()
    return {
        "kind": "train", "step": step, "loss": 3 + math.exp(-step / 20) + noise / 10, "learning_rate": 1e-4 / step,
        "grad_norm": 1 + noise, "tokens": 1024 * step, "tokens_per_second": 1000.0 + seed, "peak_memory_gib": 1.5,
        "seconds": 0.5, "loss/wiki_zh/zh": 3.1, "loss/wiki_en/en": 2.9,
    }  # fmt: skip


def evaluations(step: int, bits: float) -> list[dict[str, Any]]:
    """Two Chinese sources of different sizes and an English one; `bits` per character of the first."""
    rows = [
        ("wiki_zh", "zh", bits, 1000, 1500),
        ("news", "zh", bits / 2, 500, 4000),
        ("wiki_en", "en", bits / 4, 800, 3200),
    ]
    return [
        {
            "kind": "eval", "step": step, "source": source, "language": language, "tokens": tokens,
            "loss": rate * characters * math.log(2) / tokens, "perplexity": 9.0, "bits_per_character": rate,
            "bits_per_byte": rate / (3 if language == "zh" else 1),
        }
        for source, language, rate, tokens, characters in rows
    ]  # fmt: skip


def replies(step: int) -> list[dict[str, Any]]:
    """What a model said to a Chinese prompt and to an English one."""
    return [
        {
            "kind": "reply", "step": step, "prompt": prompt, "language": language, "reply": f"<i>{said} {step}</i>",
            "language_share": 0.5, "repetition": 0.0, "tokens": 4, "ended": step > 0,
        }
        for prompt, language, said in (("春天来了，", "zh", "花开"), ("Spring is here,", "en", "and flowers"))
    ]  # fmt: skip


def write_sweep(folder: Path, runs: int = 12, steps: int = 60) -> Path:
    """A sweep over rank and learning rate, of which number 3 has failed and the last has not begun."""
    trials = []
    for number in range(runs):
        overrides = {"lora.rank": (4, 8, 16)[number % 3], "stage.learning_rate": (1e-4, 3e-4)[number // 3 % 2]}
        words = tuple(f"{key}={value}" for key, value in overrides.items())
        if number < runs - 1:
            write_run(folder / str(number), words, steps, number, ended=number != 3)
        trials.append({
            "number": number, "folder": str(number), "overrides": overrides, "values": {},
            "state": "failed" if number == 3 else "finished" if number < runs - 1 else "running",
            "error": "the loss was <b>not</b> finite; lower stage.learning_rate." if number == 3 else None,
        })  # fmt: skip
    lines = [json.dumps({**trial, "state": "running", "error": None}) for trial in trials]
    lines += [json.dumps(trial, ensure_ascii=False) for trial in trials]
    (folder / "trials.jsonl").write_text("\n".join(lines) + '\n{"number": 1, "sta', encoding="utf-8")
    return folder
