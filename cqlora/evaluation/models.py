"""Which models are compared, what each is called, and how it is held while it is measured."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cqlora.base import (
    ADAPTER_CONFIG,
    CARD,
    fingerprint_adapter,
    fingerprint_tokenizer,
    fingerprint_weights,
    read_base,
    read_card,
)
from cqlora.errors import ConfigError
from cqlora.inference.damage import described_as_damage
from cqlora.lineage import check_fingerprints
from cqlora.positions import scale_as_trained
from cqlora.system.sealed import hash_document

if TYPE_CHECKING:
    from cqlora.engine import LlamaEngine


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A base or merged model by itself, or a base with an adapter."""

    name: str
    base: Path
    adapter: Path | None = None
    quantization: str = "auto"
    """auto: an adapter's base as it was trained on, a model by itself as it is; nf4; none."""
    held_as: Path | None = None
    """The adapter beside whose base, held in NF4, this model stands by itself."""
    adapter_shown: str = ""
    """What the record names in place of the adapter's folder, where that is a passing one."""

    def open(self, dtype: str, device: str) -> "LlamaEngine":
        """The model, loaded.

        Raises:
            ModelError: a folder is damaged, or of a kind that the engine does not run.
        """
        from cqlora.engine import LlamaEngine

        return LlamaEngine(
            self.adapter or self.base,
            self.base if self.adapter else "",
            use_lora=self.adapter is not None,
            quantization=self.quantization,
            dtype=dtype,
            device=device,
            held_as=self.held_as or "",
        )

    def check(self) -> None:
        """Raise for folders that are missing or do not belong together, without loading a weight."""
        with described_as_damage(self.base, self.adapter):
            read_base(self.base)
            if self.adapter is None:
                return
            if not (self.adapter / ADAPTER_CONFIG).is_file():
                raise ConfigError(f"{self.adapter} has no {ADAPTER_CONFIG}; give a finished run's adapter/ folder.")
            check_fingerprints(self.adapter, fingerprint_tokenizer(self.base), fingerprint_weights(self.base))

    def count_positions(self) -> int:
        """Positions that it has, an adapter's scaling counted."""
        cards = [] if self.adapter is None else [(read_card(self.adapter), self.adapter / CARD)]
        return int(scale_as_trained(read_base(self.base).config, cards, self.base)["max_position_embeddings"])

    def describe(self) -> dict[str, Any]:
        """Its name, folders and a fingerprint of all that decides its numbers, for the record."""
        parts = [fingerprint_weights(self.base), fingerprint_tokenizer(self.base)]
        if self.adapter is not None:
            parts.append(fingerprint_adapter(self.adapter))
        adapters = [] if self.adapter is None else [self.adapter_shown or str(self.adapter)]
        return {"name": self.name, "base": str(self.base), "adapters": adapters, "fingerprint": hash_document(parts)}


def read_models(words: list[str], quantization: str = "auto") -> list[ModelChoice]:
    """The models that `FOLDER` and `BASE+ADAPTER` stand for.

    A base that stands by itself is held as the first adapter of it in the list was trained on, so that what differs
    between the two is the adapter.

    Raises:
        ConfigError: a word that names no folders, or the same model twice.
    """
    pairs = [split_word(word) for word in words]
    if len({tuple(part and part.resolve() for part in pair) for pair in pairs}) < len(pairs):
        raise ConfigError(f"models={words} names a model twice; name each once.")
    short = [f"{label(base)}+{label(adapter)}" if adapter else label(base) for base, adapter in pairs]
    names = short if len(set(short)) == len(short) else words
    choices = [
        ModelChoice(name, base, adapter, quantization) for name, (base, adapter) in zip(names, pairs, strict=True)
    ]
    return [hold_alike(choice, choices) for choice in choices]


def split_word(word: str) -> tuple[Path, Path | None]:
    """Base and adapter of `BASE+ADAPTER`; a folder whose own name has a plus sign is one model."""
    base, plus, adapter = word.partition("+")
    if not plus or Path(word).is_dir():
        return Path(word).expanduser(), None
    if "+" in adapter and not Path(adapter).is_dir():
        raise ConfigError(
            f"models= has {word}, and a model takes one adapter; merge the first into the base with `cqlora merge`."
        )
    if not base or not adapter:
        raise ConfigError(f"models= has {word}, which lacks a folder; use BASE or BASE+ADAPTER.")
    return Path(base).expanduser(), Path(adapter).expanduser()


def label(folder: Path) -> str:
    """What a folder is called: an adapter/ by the run that it lies in."""
    return folder.parent.name if folder.name == "adapter" and folder.parent.name else folder.name or str(folder)


def hold_alike(choice: ModelChoice, others: list[ModelChoice]) -> ModelChoice:
    """A model by itself, held as an adapter among the others was trained on it."""
    if choice.adapter is not None or choice.quantization != "auto":
        return choice
    trained = next((each.adapter for each in others if each.adapter and each.base == choice.base), None)
    if trained is None:
        return choice
    card = read_card(trained).get("trained_on", {})
    in_nf4 = card.get("quantization") == "nf4" and card.get("method") != "pissa"
    return replace(choice, quantization="nf4", held_as=trained) if in_nf4 else choice
