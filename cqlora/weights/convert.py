"""Meta's raw weights to a Hugging Face folder, a few rows at a time, extended where asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqlora.base import fingerprint_tokenizer, seal_card
from cqlora.errors import ConfigError, ModelError
from cqlora.system.documents import write_json
from cqlora.system.durable import staged_folder
from cqlora.system.fingerprints import combine
from cqlora.system.shards import write_shards
from cqlora.vocab.config import VocabConfig, VocabKind
from cqlora.vocab.extension import Extension
from cqlora.vocab.fast import is_rank_file, write_meta_tokenizer
from cqlora.weights.extend import write_extended
from cqlora.weights.meta import MetaCheckpoint

SIZES = {
    "7B": (4096, 32, 32), "13B": (5120, 40, 40), "30B": (6656, 60, 52), "65B": (8192, 80, 64),
    "70B": (8192, 80, 8), "8B": (4096, 32, 8), "1B": (2048, 16, 8), "3B": (3072, 28, 8),
}  # fmt: skip
"""Width, layers and key-value heads by the size's name."""

OTHER_NAMES = {"33B": "30B"}
POSITIONS = {"1": 2048, "2": 4096, "3": 8192, "3.1": 131_072}
"""Positions that each generation was trained on, which none of its files says."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was converted."""

    checkpoint: MetaCheckpoint
    llama_version: str
    extension: Extension | None


def convert(
    input_dir: Path,
    output_dir: Path,
    model_size: str,
    llama_version: str,
    max_shard_size: int,
    vocab: VocabConfig,
) -> Conversion:
    """Write the folder.

    Args:
        input_dir: folder of a checkpoint, or with `model_size` its parent, as Meta's download has it.
        output_dir: folder to make.
        model_size: `7B`, `65B` …, checked against the files; empty takes any.
        llama_version: `1`, `2`, `3`, `3.1`, or `auto` to tell by the files.
        max_shard_size: bytes of the largest file to write.
        vocab: what to add on the way.

    Raises:
        ModelError: files that are missing, damaged, or of another size than `model_size`.
        ConfigError: an unknown `model_size` or `llama_version`.
    """
    folder = find_checkpoint(input_dir, model_size)
    checkpoint = MetaCheckpoint(folder)
    check_size(checkpoint, model_size)
    tokenizer = find_tokenizer(folder)
    version = infer_version(checkpoint, is_rank_file(tokenizer)) if llama_version == "auto" else llama_version
    if version not in POSITIONS:
        raise ConfigError(f"llama_version={version} does not exist; use auto, {', '.join(POSITIONS)}.")
    with staged_folder(output_dir) as staging:
        special_ids = write_meta_tokenizer(tokenizer, staging, POSITIONS[version], llama31=version == "3.1")
        write_json(staging / "generation_config.json", special_ids)
        config = checkpoint.config(POSITIONS[version], special_ids)
        extension = write_weights(checkpoint, config, staging, vocab, max_shard_size)
    return Conversion(checkpoint, version, extension)


def write_weights(
    checkpoint: MetaCheckpoint, config: dict[str, Any], staging: Path, vocab: VocabConfig, max_shard_size: int
) -> Extension | None:
    """Write shards, card and config.json, extended where `vocab` says so."""
    card: dict[str, Any] = {"source": f"Meta's {checkpoint.folder.name}"}
    if vocab.kind is not VocabKind.none:
        return write_extended(checkpoint, config, staging, vocab, max_shard_size, card)
    specs = checkpoint.specs.values()
    digests = write_shards(staging, specs, lambda spec: checkpoint.blocks(spec.name), max_shard_size)
    card |= {
        "tokenizer_sha256": fingerprint_tokenizer(staging),
        "weights_sha256": combine(config, specs, digests),
    }
    seal_card(staging, card)
    write_json(staging / "config.json", config)
    return None


def find_checkpoint(input_dir: Path, model_size: str) -> Path:
    """The folder that holds params.json: `input_dir` itself, or `input_dir/65B` by its size."""
    if not input_dir.is_dir():
        raise ModelError(f"input_dir={input_dir} does not exist; give the folder of Meta's files.")
    if (input_dir / "params.json").is_file() or not model_size:
        return input_dir
    names = {model_size, OTHER_NAMES.get(model_size, model_size)}
    names |= {other for other, name in OTHER_NAMES.items() if name == model_size}
    for name in sorted(names):
        if (input_dir / name).is_dir():
            return input_dir / name
    raise ModelError(
        f"input_dir={input_dir} has neither params.json nor a folder {' or '.join(sorted(names))}; give the "
        "folder of Meta's files, or its parent."
    )


def find_tokenizer(folder: Path) -> Path:
    """`tokenizer.model` of a checkpoint, in its folder or beside it."""
    for place in (folder, folder.parent):
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    raise ModelError(f"neither {folder} nor {folder.parent} has a tokenizer.model; put it there.")


def check_size(checkpoint: MetaCheckpoint, model_size: str) -> None:
    """Compare the files with the size that was asked for.

    Raises:
        ConfigError: no model has that name.
        ModelError: the files are of another size.
    """
    if not model_size:
        return
    asked = OTHER_NAMES.get(model_size, model_size)
    if asked not in SIZES:
        raise ConfigError(f"model_size={model_size} does not exist; use one of {', '.join([*SIZES, *OTHER_NAMES])}.")
    params = checkpoint.params
    shape = (params.dim, params.n_layers, params.n_kv_heads)
    if shape != SIZES[asked]:
        known = next((name for name, sizes in SIZES.items() if sizes == shape), None)
        raise ModelError(
            f"model_size={model_size} has width, layers, key-value heads {SIZES[asked]}, but the files in "
            f"{checkpoint.folder} have {shape}; use model_size={known or chr(39) * 2}."
        )


def infer_version(checkpoint: MetaCheckpoint, ranks: bool) -> str:
    """The generation of a checkpoint: Llama 3 by its tokenizer, 3.1 by its scaled rotary frequencies.

    Of the earlier two LLaMA has norm_eps 1e-6, or the 60 and 80 layers of 30B and 65B, and never says
    n_kv_heads.
    """
    params = checkpoint.params
    if ranks:
        return "3.1" if params.use_scaled_rope else "3"
    first = not params.states_kv_heads and (params.norm_eps < 5e-6 or params.n_layers in (60, 80))
    return "1" if first else "2"
