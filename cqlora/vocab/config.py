"""The options of a vocabulary (`vocab=`, `vocab.size=` …); the only place for their defaults. No torch."""

import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from cqlora.config.checks import check_fields, require_positive, require_range, require_used
from cqlora.config.schema import CONFIG_DIR
from cqlora.errors import ConfigError

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|end-paragraph|>")
PAD_TOKEN = "<|pad|>"


class VocabKind(Enum):
    """Where new pieces come from."""

    none = "none"
    auto = "auto"
    cjk = "cjk"
    sentencepiece = "sentencepiece"
    path = "path"
    bpe = "bpe"


class RowInit(Enum):
    """What a new row starts from; docs/vocabulary.md has the measurements."""

    subpiece_mean = "subpiece_mean"
    mean = "mean"
    sampled = "sampled"
    weighted = "weighted"
    distilled = "distilled"


@dataclass(kw_only=True, slots=True)
class VocabConfig:
    """New pieces for a base's tokenizer and what their rows start from."""

    kind: VocabKind = VocabKind.none
    """Where new pieces come from; auto is what the base's tokenizer asks for."""
    model: str = ""
    """SentencePiece model whose pieces are merged (kind path)."""
    size: int = 8000
    """Pieces of the trained SentencePiece model, or pieces that merges add to a byte-level BPE."""
    corpus: list[str] = field(default_factory=list)
    """Files or folders of text to learn from and to check on; empty is the text bundled with cqlora."""
    max_characters: int = 15_000_000
    """Chinese characters of the corpus to learn from, sampled evenly when it has more."""
    min_frequency: int = 4
    """Times that a learned piece must occur; a small corpus gives fewer than `size` pieces."""
    held_out_fraction: float = 0.1
    """Documents set aside from learning, on which the report counts."""
    init: RowInit = RowInit.weighted
    """What a new row starts from; docs/vocabulary.md has the measurements."""
    distill_steps: int = 100
    """init=distilled: steps in which rows are fitted to the base's own reading of the corpus, 640 characters each."""
    control_tokens: bool = True
    """Add <|im_start|>, <|im_end|>, <|end-paragraph|> and <|pad|> where the base lacks them."""
    pad_to_multiple_of: int = 64
    """Rows that the embedding matrices are padded to; 1 adds none."""
    seed: int = 1
    """Of init=sampled, and of the text that init=distilled reads."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("model", "corpus"))
        learned = self.kind in (VocabKind.auto, VocabKind.sentencepiece, VocabKind.bpe)
        for key in ("size", "max_characters"):
            require_used(self, key, learned, "vocab=auto, sentencepiece or bpe")
        require_used(self, "min_frequency", learned and self.kind is not VocabKind.sentencepiece, "vocab=auto or bpe")
        drawn = self.init in (RowInit.sampled, RowInit.distilled)
        require_used(self, "seed", drawn, "vocab.init=sampled or distilled")
        require_used(self, "distill_steps", self.init is RowInit.distilled, "vocab.init=distilled")
        require_range("vocab.seed", self.seed, 0, 2**31 - 1)
        if not all(self.corpus):
            raise ConfigError("vocab.corpus holds an empty path; give files or folders of text.")
        require_positive(self, "size", "max_characters", "min_frequency", "pad_to_multiple_of", "distill_steps")
        require_range("vocab.held_out_fraction", self.held_out_fraction, 0.0, 0.9)
        if self.kind is VocabKind.path and not self.model:
            raise ConfigError("vocab=path needs vocab.model=FILE, a SentencePiece model.")
        if self.model and self.kind is not VocabKind.path:
            raise ConfigError(f"vocab.model={self.model} is read with vocab=path only, not vocab={self.kind.name}.")


def refuse_distilled(vocab: VocabConfig, given: str) -> None:
    """Raise ConfigError for rows that are to be fitted with a base that is no Hugging Face folder yet."""
    if vocab.init is RowInit.distilled:
        raise ConfigError(
            f"vocab.init=distilled runs the base, and {given} is no Hugging Face folder; convert it first without a "
            "vocabulary, then `cqlora extend` the folder."
        )


def accept_path(arguments: list[str]) -> list[str]:
    """Read `vocab=/a/tokenizer.model` as `vocab=path vocab.model=/a/tokenizer.model`."""
    choices = {file.stem for file in (CONFIG_DIR / "vocab").glob("*.yaml")}
    accepted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        names_file = key == "vocab" and value not in choices and (Path(value).suffix or "/" in value)
        accepted += ["vocab=path", f"vocab.model={value}"] if equals and names_file else [argument]
    return accepted


def accept_path_in_command_line() -> None:
    """Let the program's own arguments name a SentencePiece model as `vocab=FILE`."""
    sys.argv[1:] = accept_path(sys.argv[1:])
