"""`python -m cqlora.generate`: documents that a base writes itself, to be replayed where there is no other text."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from cqlora.base import fingerprint_weights, read_base
from cqlora.cli import run_program
from cqlora.config.checks import check_fields, require_positive, require_range
from cqlora.engine_config import EngineConfig
from cqlora.errors import ConfigError
from cqlora.inference.requests import Sampling, check_held
from cqlora.system.durable import hold, replace_file
from cqlora.system.journal import read_line, tell_damage
from cqlora.system.refusals import described_as_sentence
from cqlora.system.sealed import read_sealed, seal_document
from cqlora.system.signals import stop_on_signals

if TYPE_CHECKING:
    from cqlora.engine import LlamaEngine
    from cqlora.inference.batch import Reply

_FREE = ("documents", "slots", "output", "base")
"""Keys that may change before the same command goes on: no document depends on them; a base is told by its weights."""

_MOST_SLOTS = 4096


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """Who writes, how much, and where to."""

    base: str = MISSING
    """The base's folder, or a merged model's."""
    output: str = MISSING
    """JSON lines to write, rows with `text`; where it has some already, those that are missing are added."""
    documents: int = 1000
    """Documents in all."""
    max_tokens: int = 512
    """Tokens after which a document ends that has not ended itself."""
    opening: str = ""
    """What every document begins with; empty lets the base begin."""
    temperature: float = 1.0
    """Of sampling; 1 is the base's own distribution."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens that together have this probability; 1 is all."""
    slots: int = 16
    """Documents that are written at the same time."""
    seed: int = 1
    """The same seed gives the same documents."""
    dtype: str = "auto"
    """auto (what computes fastest here), float32, bfloat16."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("base", "output"), filled=("base", "output"))
        check_held("auto", self.dtype, "auto")
        require_positive(self, "documents", "max_tokens", "temperature")
        require_range("slots", self.slots, 1, _MOST_SLOTS)
        require_range("seed", self.seed, 0, 2**31 - 1)
        self.sampling(0)
        if not self.output.endswith(".jsonl"):
            raise ConfigError(f"output={self.output} is written as JSON lines; give a name that ends in .jsonl.")

    def sampling(self, number: int) -> Sampling:
        """How the document of this number is written: by a seed of its own, whoever is written beside it."""
        digest = hashlib.sha256(f"{self.seed}:{number}".encode()).digest()
        return Sampling(
            max_new_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=int.from_bytes(digest[:7], "little"),
        )


def generate(config: GenerateConfig) -> None:
    """Write the documents that are missing, each as soon as it has ended, and say how to replay them."""
    from cqlora.system.progress import StageDisplay, show_log

    show_log()
    output = Path(config.output)
    base = read_base(config.base)
    with described_as_sentence(output), hold(output):
        documents = take_up(config, output, fingerprint_weights(base.path))
        missing = [number for number in range(config.documents) if number not in documents]
        engine = EngineConfig(base=config.base, dtype=config.dtype, cache=False, prefix_cache_gib=0).load_engine()
        with output.open("a", encoding="utf-8") as stream, StageDisplay(is_main=True) as display:
            for done, row in enumerate(write_documents(engine, config, missing), config.documents - len(missing) + 1):
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                stream.flush()
                documents[row["id"]] = row["text"]
                display.show("documents", done, config.documents)
    # A source cannot be added on the command line.
    source = json.dumps({"kind": "text", "path": str(output.absolute()), "replay": True}, ensure_ascii=False)
    print(
        f"{output} holds {describe_documents(documents, config.documents)}; to replay them write this under "
        f"`sources:` of a data file of yours (docs/data.md) and add data.replay=0.2 to the run:\n  own: {source}"
    )


def describe_documents(documents: dict[int, str], asked: int) -> str:
    """How many documents there are, where that is not what was asked for or not all have text."""
    told = f"{len(documents):,} documents"
    told += f" ({asked:,} were asked for)" if len(documents) != asked else ""
    empty = sum(not text.strip() for text in documents.values())
    return told + (f", {empty:,} of them empty, which no run reads" if empty else "")


def take_up(config: GenerateConfig, output: Path, weights: str) -> dict[int, str]:
    """The documents that `output` holds, by number; a line that is damaged or cut short is taken from it.

    Raises:
        ConfigError: they were written by another base, or otherwise.
    """
    card = output.with_name(f"{output.name}.settings.json")
    settings = {key: value for key, value in asdict(config).items() if key not in _FREE} | {"base_sha256": weights}
    if not output.exists():
        replace_file(card, seal_document(settings))
        output.touch()
        return {}
    earlier = read_sealed(card)
    if earlier is None:
        raise ConfigError(f"output={output} was not written by `cqlora generate`; give another name.")
    for key, value in settings.items():
        if earlier.get(key) != value:
            raise ConfigError(f"output={output} was written with {key}={earlier.get(key)}; give another name.")
    return read_documents(output)


def read_documents(output: Path) -> dict[int, str]:
    """The whole documents of a file by number, the others taken from it; the same command writes them again."""
    documents: dict[int, str] = {}
    content, kept = output.read_bytes(), []
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        row = (read_line(line) if line.endswith(b"\n") else None) or {}
        if type(row.get("id")) is int and isinstance(row.get("text"), str):
            documents[row["id"]] = row["text"]
            kept.append(line)
        elif number < len(lines):
            tell_damage(output, number)
    if len(kept) < len(lines):
        replace_file(output, b"".join(kept))
    return documents


def write_documents(engine: "LlamaEngine", config: GenerateConfig, numbers: list[int]) -> Iterator[dict[str, Any]]:
    """The documents of these numbers as rows, as they end; each beginning as a document does in training."""
    batch = engine.open_batch(config.slots)
    prompt = engine.encode_text(config.opening)
    waiting = iter(numbers)
    rows: dict[Reply, dict[str, Any]] = {}
    while True:
        for number in islice(waiting, batch.free_slots):
            rows[batch.admit(prompt, config.sampling(number))] = {"id": number, "text": config.opening}
        if not rows:
            return
        for reply, text in batch.step():
            if reply.failure:
                raise reply.failure
            rows[reply]["text"] += text
            if reply.finish_reason:
                yield rows.pop(reply)


def main() -> None:
    """The verb `generate`."""
    ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)
    with stop_on_signals():
        run_program("generate", GenerateConfig, generate)


if __name__ == "__main__":
    main()
