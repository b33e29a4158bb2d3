"""What is measured, of which models, on which text: the keys of `evaluate`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cqlora.config.checks import check_fields, check_path, require_positive, require_range, require_used
from cqlora.config.schema import DataConfig
from cqlora.errors import ConfigError
from cqlora.evaluation.choice import BENCHMARKS
from cqlora.evaluation.text import Windows
from cqlora.inference.requests import check_held

MOST_WINDOW = 1024
"""Tokens; more context changes little of a perplexity and costs time."""
PARTS = ("text", "probe", "generations")
"""What is measured unless it is left out; multiple choice is added by `tasks`."""
PROMPT_FORMS = ("auto", "chat", "text")


@dataclass(kw_only=True, slots=True)
class BenchmarkConfig:
    """Where a benchmark lies on this machine."""

    root: str = ""
    """Folder in the benchmark's published layout; empty takes lm-eval's own dataset, from a hub."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("root",))


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Models side by side, the text that they are measured on, and what is measured."""

    base: str = ""
    """A model's folder: a base, or a merged model."""
    adapter: Any = field(default_factory=list)
    """Adapter folder of the base, or several, [FIRST,SECOND]: the base is compared with itself under each."""
    models: list[str] = field(default_factory=list)
    """In place of base and adapter, any models: FOLDER or BASE+ADAPTER; differences are to the first."""
    run: str = ""
    """In place of them, a run's folder, whether it goes on or has ended: its base, and the base with what the run has
    trained."""
    checkpoint: str = ""
    """Of the run: adapter (what it has ended with), or one such as step-00000050; empty takes the adapter where there
    is one, else the newest whole checkpoint."""
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    """What is measured: text, probe, generations; tasks adds multiple choice."""
    files: list[str] = field(default_factory=list)
    """Held-out text: plain files, or rows with a `text` field; empty takes the validation text of data."""
    separator: str = ""
    """What stands between two documents of a plain file, `\\n` for a new line; empty is one document a file."""
    data: DataConfig | None = None
    """The data group whose validation text is scored; null is the run's own, and without a run the sample."""
    characters: int = 20_000
    """Of each source and language, in whole documents, the same for every vocabulary; 0 takes all."""
    window: int | None = None
    """Tokens that a prediction may look back on; null is 1,024, or the positions of the model that has the fewest."""
    stride: int | None = None
    """Tokens that each further window of a long document predicts; null is half of window."""
    tasks: list[str] = field(default_factory=list)
    """Multiple choice: ceval, cmmlu, mmlu, or any other task of lm-eval that has an accuracy."""
    shots: list[int] = field(default_factory=lambda: [0, 5])
    """Examples before each question; each number is a score of its own."""
    limit: int | None = None
    """Questions of each subject, for a first look; null asks all."""
    ceval: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    cmmlu: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    mmlu: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    prompt_form: str = "auto"
    """Generations: as questions in a chat (chat), or as openings to go on with (text); auto is chat where every model's
    tokenizer has the tokens of turns."""
    max_new_tokens: int = 96
    """Longest generation, in tokens."""
    quantization: str = "auto"
    """auto: an adapter's base as it was trained on, and so the base beside it, any other model as it is; nf4; none."""
    dtype: str = "float32"
    """float32 (the same numbers in any batch), bfloat16, or auto (what computes fastest here)."""
    device: str = "auto"
    """auto, cpu, cuda, or one GPU such as cuda:1."""
    batch_tokens: int = 2048
    """Tokens in one forward pass."""
    seed: int = 1
    """Of the probe's examples, and of what a data group holds out unless it is a run's own, which has the run's."""
    output: str = ""
    """File that the record is written to; empty is evaluation.json in the run's folder, or without a run in a new
    folder under outputs/evaluate."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("base", "run", "output"))
        self.adapter = [self.adapter] if isinstance(self.adapter, str | Path) else self.adapter
        if not isinstance(self.adapter, list) or not all(
            isinstance(each, str | Path) and each for each in self.adapter
        ):
            raise ConfigError(f"adapter={self.adapter} is no folder; use adapter=FOLDER or adapter=[FIRST,SECOND].")
        for key in ("adapter", "files", "models"):
            paths = [os.path.expanduser(os.fspath(path)) for path in getattr(self, key)]
            for path in paths:
                check_path(key, path)
            setattr(self, key, paths)
        self._check_models()
        self._check_parts()
        self._check_text()
        check_held(self.quantization, self.dtype, self.device)
        require_positive(self, *["window"] * (self.window is not None), "batch_tokens", "max_new_tokens")
        require_range("characters", self.characters, 0, 1 << 62)
        require_range("seed", self.seed, 0, 2**31 - 1)

    def _check_models(self) -> None:
        given = [key for key in ("base", "models", "run") if getattr(self, key)]
        if len(given) != 1:
            what = f"{' and '.join(f'{key}=' for key in given)} are both" if given else "no model is"
            raise ConfigError(f"{what} given; use one of base=FOLDER, models=[FOLDER,BASE+ADAPTER], run=FOLDER.")
        require_used(self, "adapter", bool(self.base), "base=FOLDER")
        require_used(self, "checkpoint", bool(self.run), "run=FOLDER")

    def _check_text(self) -> None:
        if self.files and self.data is not None:
            raise ConfigError(f"files= and data={self.data.name} are both given; use one of them.")
        for file in self.files:
            if not Path(file).exists():
                raise ConfigError(f"files= names {file}, which does not exist; give a file of text.")
        window = self.window or MOST_WINDOW
        if self.stride is not None and not 0 < self.stride <= window:
            raise ConfigError(f"stride={self.stride} is out of range; use a value from 1 to window={window}.")
        scored = "text" in self.parts
        for key in ("files", "data", "characters", "window", "stride"):
            require_used(self, key, scored, "text among parts")
        require_used(self, "separator", bool(self.files), "files=[FILE]")

    def _check_parts(self) -> None:
        unknown = next((part for part in self.parts if part not in PARTS), None)
        if unknown is not None:
            raise ConfigError(f"parts= has {unknown}; use some of {', '.join(PARTS)}, and tasks=[…] for choice.")
        if len(set(self.parts)) < len(self.parts):
            raise ConfigError(f"parts={self.parts} names a part twice; name each once.")
        if not self.parts and not self.tasks:
            raise ConfigError(f"parts=[] measures nothing; use some of {', '.join(PARTS)}, or give tasks=[ceval].")
        if self.prompt_form not in PROMPT_FORMS:
            raise ConfigError(f"prompt_form={self.prompt_form} is unknown; use {', '.join(PROMPT_FORMS)}.")
        for key in ("prompt_form", "max_new_tokens"):
            require_used(self, key, "generations" in self.parts, "generations among parts")
        for key in ("shots", "limit"):
            require_used(self, key, bool(self.tasks), "tasks=[ceval]")
        if not self.shots or min(self.shots) < 0 or len(set(self.shots)) < len(self.shots):
            raise ConfigError(f"shots={self.shots} are no numbers of examples; use such as [0,5].")
        if self.limit is not None:
            require_positive(self, "limit")
        for name, root in self.roots.items():
            if root and name not in self.tasks:
                raise ConfigError(f"{name}.root={root} has no effect without tasks=[{name}]; add it, or leave it out.")

    @property
    def roots(self) -> dict[str, str]:
        """The local folder of each benchmark, empty for none."""
        return {name: getattr(self, name).root for name in BENCHMARKS}

    @property
    def windows(self) -> Windows:
        """How documents are read."""
        window = self.window or MOST_WINDOW
        return Windows(window, min(self.stride or max(1, window // 2), window), self.batch_tokens)

    def list_words(self) -> list[str]:
        """The models as `FOLDER` or `BASE+ADAPTER`; those of a run are for the caller to find."""
        return self.models or [self.base, *(f"{self.base}+{adapter}" for adapter in self.adapter)]
