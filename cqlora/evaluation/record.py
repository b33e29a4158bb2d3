"""Measuring models one after the other, and evaluation.json, the record of it."""

import dataclasses
import gc
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cqlora.config.schema import DataConfig
from cqlora.data.held_out import HeldOutText, read_files, read_validation
from cqlora.errors import ConfigError, ModelError
from cqlora.evaluation.choice import check_tasks, score_choices
from cqlora.evaluation.config import MOST_WINDOW, EvaluateConfig
from cqlora.evaluation.generations import generate, read_prompts
from cqlora.evaluation.models import ModelChoice, read_models
from cqlora.evaluation.probe import list_patterns, probe
from cqlora.evaluation.text import TextScore, score_text
from cqlora.system.documents import read_object
from cqlora.system.durable import make_folder, replace_file

if TYPE_CHECKING:
    from cqlora.engine import LlamaEngine

VERSION = 1
FILE_NAME = "evaluation.json"
Progress = Callable[[str, int, int | None], None]
"""(what is being measured, done, of how many)."""
Record = dict[str, Any]


def evaluate_models(
    config: EvaluateConfig,
    models: list[ModelChoice] | None = None,
    default_data: DataConfig | None = None,
    default_seed: int | None = None,
    progress: Progress = lambda part, done, total: None,
) -> Record:
    """Measure models side by side; return the record.

    Args:
        config: what is measured.
        models: the models, where they are not those that `config` names.
        default_data: whose validation text is scored where neither files nor data are given.
        default_seed: of what that group holds out; None is the configuration's.
        progress: told of what is being done.

    Raises:
        ConfigError: nothing to score, or a model that cannot be measured so.
        DataError: text that cannot be read.
        ModelError: folders that are damaged or do not belong together.
    """
    models = models or read_models(config.list_words(), config.quantization)
    for model in models:
        model.check()
    check_tasks(config.tasks, config.roots)
    if "text" in config.parts:
        config = settle_window(config, models)
    texts: list[HeldOutText] = []
    if "text" in config.parts:
        texts = read_texts(config, default_data, default_seed, progress)
    as_chat = "generations" in config.parts and ask_as_chat(config, models)
    measured, firsts = [], None
    for model in models:
        entry, scores = measure(config, model, texts, as_chat, progress)
        if firsts is not None:
            for row, score, first in zip(entry.get("text", []), scores, firsts, strict=True):
                row |= score.difference(first)
        firsts = firsts or scores
        measured.append(entry)
    return {"version": VERSION, "settings": describe_settings(config, as_chat), "models": measured}


def read_texts(
    config: EvaluateConfig, default_data: DataConfig | None, default_seed: int | None, progress: Progress
) -> list[HeldOutText]:
    """The text that every model is scored on."""
    if config.files:
        return read_files(config.files, config.separator, config.characters)
    if config.data is not None:
        return read_validation(config.data, config.seed, config.characters, progress)
    if default_data is None:
        raise ConfigError("there is no text to score; give files=[FILE], or data=NAME.")
    seed = config.seed if default_seed is None else default_seed
    return read_validation(default_data, seed, config.characters, progress)


def ask_as_chat(config: EvaluateConfig, models: list[ModelChoice]) -> bool:
    """Whether generations are asked for in a conversation; all models are asked alike."""
    from cqlora.data.templates import form_of_adapter, form_of_model
    from cqlora.data.tokenizer import PlainTokenizer

    if config.prompt_form != "auto":
        return config.prompt_form == "chat"
    forms = [form_of_adapter(each.adapter, each.base) if each.adapter else form_of_model(each.base) for each in models]
    return all(form.fits(PlainTokenizer(model.base)) for form, model in zip(forms, models, strict=True))


def settle_window(config: EvaluateConfig, models: list[ModelChoice]) -> EvaluateConfig:
    """The configuration with one window for all models, which each has positions for.

    Raises:
        ConfigError: the window that is asked for is longer than a model's positions.
    """
    positions = {model.adapter or model.base: model.count_positions() for model in models}
    fewest = min(positions, key=lambda folder: positions[folder])
    if config.window is not None and config.window > positions[fewest]:
        raise ConfigError(
            f"window={config.window} is beyond the {positions[fewest]} positions of {fewest}; use "
            f"window={positions[fewest]} or less."
        )
    return replace(config, window=config.window or min(MOST_WINDOW, positions[fewest]))


def measure(
    config: EvaluateConfig, model: ModelChoice, texts: list[HeldOutText], as_chat: bool, progress: Progress
) -> tuple[Record, list[TextScore]]:
    """One model's part of the record, and its losses by document."""
    progress(f"{model.name}: loading", 0, None)
    engine = model.open(config.dtype, config.device)
    entry: Record = {**model.describe(), "form": engine.form}
    scores = list(score_texts(config, engine, model.name, texts, progress))
    if scores:
        entry["text"] = [score.describe() for score in scores]
    if "probe" in config.parts:
        entry["probe"] = list(score_patterns(config, engine, model.name, progress))
    if config.tasks:
        entry["choice"] = list(score_tasks(config, engine, model, progress))
    if "generations" in config.parts:
        entry["generations"] = []
        for done, reply in enumerate(generate(engine, as_chat, config.max_new_tokens), start=1):
            entry["generations"].append(reply)
            progress(f"{model.name}: generations", done, len(read_prompts()))
    del engine
    # A model beside the next one would take the memory of both.
    gc.collect()
    return entry, scores


def score_texts(
    config: EvaluateConfig, engine: "LlamaEngine", name: str, texts: list[HeldOutText], progress: Progress
) -> Iterator[TextScore]:
    """A score for every source and language."""
    for text in texts:
        part, total = f"{name}: {text.source} ({text.language})", len(text.documents)

        def tick(done: int, part: str = part, total: int = total) -> None:
            progress(part, done, total)

        yield score_text(engine, text, config.windows, tick)


def score_patterns(config: EvaluateConfig, engine: "LlamaEngine", name: str, progress: Progress) -> Iterator[Record]:
    """A line for every pattern of the probe."""
    patterns = list_patterns()
    for done, pattern in enumerate(patterns, start=1):
        yield probe(engine, pattern, config.seed, config.batch_tokens)
        progress(f"{name}: probe", done, len(patterns))


def score_tasks(
    config: EvaluateConfig, engine: "LlamaEngine", model: ModelChoice, progress: Progress
) -> Iterator[Record]:
    """A score for every task and number of shots."""
    total, done = len(config.tasks) * len(config.shots), 0
    progress(f"{model.name}: tasks", done, total)
    for task in config.tasks:
        root = config.roots.get(task, "")
        found = score_choices(engine, model.base, task, root, config.shots, config.limit, config.batch_tokens)
        for score in found:
            done += 1
            progress(f"{model.name}: tasks", done, total)
            yield score.describe()


def describe_settings(config: EvaluateConfig, as_chat: bool) -> Record:
    """What was asked for, and by which versions it was answered."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "data"}
    settings["data"] = config.data.name if config.data else None
    if "generations" in config.parts:
        settings["prompt_form"] = "chat" if as_chat else "text"
    packages = ["torch", *(["lm_eval"] if config.tasks else [])]
    return settings | {"versions": {name: find_version(name) for name in packages}}


def find_version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def refuse_foreign(file: Path) -> None:
    """Raise ConfigError for a file that is there and was not written by `evaluate`."""
    if not file.exists():
        return
    try:
        known = {"version", "settings", "models"} <= read_object(file).keys()
    except ModelError:
        known = False
    if not known:
        raise ConfigError(f"output={file} is there and was not written by `cqlora evaluate`; give another name.")


def write_record(record: Record, file: Path) -> None:
    """Put the record on the disk, whole or not at all."""
    make_folder(file.parent)
    replace_file(file, (json.dumps(as_json(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def as_json(value: Any) -> Any:
    """The value with null where JSON has no number, such as an infinite perplexity."""
    if isinstance(value, dict):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
