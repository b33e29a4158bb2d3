"""Add a vocabulary to a base by streaming: the embedding matrices change, all else is passed on."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cqlora.base import (
    CARD,
    check_companions,
    fingerprint_tokenizer,
    fingerprint_weights,
    read_base,
    read_card,
    seal_card,
)
from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.errors import ModelError
from cqlora.system.companions import UNSEAL
from cqlora.system.documents import carry_over, read_object_if_there, write_json
from cqlora.system.durable import staged_folder
from cqlora.system.fingerprints import combine, hash_tensors
from cqlora.system.model_config import INPUT, OUTPUT
from cqlora.system.shards import (
    DTYPES,
    ShardReader,
    TensorSource,
    TensorSpec,
    write_index,
    write_shard,
    write_shards,
)
from cqlora.system.tensor_files import INDEX, SINGLE
from cqlora.vocab.config import VocabConfig
from cqlora.vocab.extension import Extension, extend_tokenizer
from cqlora.vocab.rows import initial_rows, mean_row
from cqlora.weights.gguf import GgufModel
from cqlora.weights.gguf_tokenizer import write_gguf_tokenizer

_REWRITTEN = {CARD, INDEX, "config.json", "vocab_report.json"}
_TOKENIZER_FILES = {
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExtendedSource:
    """A TensorSource whose embedding matrices have rows for new tokens; its other tensors are the base's."""

    base: TensorSource
    extension: Extension
    vocab: VocabConfig

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The base's tensors, the embedding matrices with more rows."""
        rows = self.extension.matrix_rows
        return {
            name: TensorSpec(name, spec.dtype, (rows, *spec.shape[1:])) if name in (INPUT, OUTPUT) else spec
            for name, spec in self.base.specs.items()
        }

    def blocks(self, name: str) -> Iterable[torch.Tensor]:
        """Rows of a tensor: the base's own, then the new ones, then padding."""
        return self.extended_rows(name) if name in (INPUT, OUTPUT) else self.base.blocks(name)

    def extended_rows(self, name: str) -> Iterator[torch.Tensor]:
        """An embedding matrix, extended; the base's matrix is the one tensor held meanwhile."""
        spec, extension = self.base.specs[name], self.extension
        dtype = DTYPES[spec.dtype]
        base = torch.empty(spec.shape, dtype=dtype)
        filled = 0
        for block in self.base.blocks(name):
            base[filled : filled + len(block)] = block
            filled += len(block)
        used = extension.first_row
        yield base[:used]
        for rows in initial_rows(base, used, extension.new, self.vocab.init, self.vocab.seed):
            yield narrow_rows(rows, dtype)
        # The mean row makes the logits of rows that no token uses unremarkable; zeros might stand out.
        yield narrow_rows(mean_row(base, used).repeat(extension.padding_rows, 1), dtype)


def extend(base: Path, output_dir: Path, vocab: VocabConfig, max_shard_size: int, copy: bool) -> Extension:
    """Extend a model folder or a GGUF file; `copy` copies unchanged shards instead of hard-linking them.

    Raises:
        ModelError: a base that cannot be read or extended, or an `output_dir` that is already there.
        DataError, ConfigError: see extend_tokenizer.
    """
    with staged_folder(output_dir) as staging:
        if base.is_file():
            return extend_gguf(base, staging, vocab, max_shard_size)
        return extend_folder(base, staging, vocab, copy)


def extend_gguf(file: Path, staging: Path, vocab: VocabConfig, max_shard_size: int) -> Extension:
    """Write a GGUF file's model, widened and extended, as a Hugging Face folder."""
    model = GgufModel(file)
    write_gguf_tokenizer(model, staging)
    write_json(staging / "generation_config.json", model.special_ids())
    return write_extended(model, model.config(), staging, vocab, max_shard_size, {"source": file.name})


def write_extended(
    source: TensorSource,
    config: dict[str, Any],
    staging: Path,
    vocab: VocabConfig,
    max_shard_size: int,
    card: dict[str, Any],
) -> Extension:
    """Extend the tokenizer in `staging`, and write the source's tensors there with rows for it."""
    extension = extend_tokenizer(staging, staging, vocab, source.specs[INPUT].shape[0])
    extended = ExtendedSource(source, extension, vocab)
    specs = extended.specs.values()
    digests = write_shards(staging, specs, lambda spec: extended.blocks(spec.name), max_shard_size)
    write_descriptions(staging, config, extended, digests, card)
    return extension


def extend_folder(folder: Path, staging: Path, vocab: VocabConfig, copy: bool) -> Extension:
    """Write a Hugging Face folder's model, extended; shards without an embedding matrix are linked."""
    base = read_base(folder)
    check_companions(folder, folder, UNSEAL)
    reader = ShardReader(folder)
    if INPUT not in reader.specs:
        raise ModelError(f"{folder} has no {INPUT}, so it is no LLaMA model; give another base.")
    extension = extend_tokenizer(folder, staging, vocab, reader.specs[INPUT].shape[0])
    extended = ExtendedSource(reader, extension, vocab)
    base_sha256 = fingerprint_weights(folder)
    digests = hash_tensors(reader.stored.values())
    shards: dict[str, list[TensorSpec]] = {}
    for name, spec in extended.specs.items():
        shards.setdefault(reader.file_of(name).name, []).append(spec)
    for file, specs in shards.items():
        if any(spec.name in (INPUT, OUTPUT) for spec in specs):
            digests |= write_shard(staging / file, specs, lambda spec: extended.blocks(spec.name))
        else:
            link_or_copy(folder / file, staging / file, copy)
    if list(shards) != [SINGLE]:
        write_index(staging, shards)
    carry_over(folder, staging, _REWRITTEN | _TOKENIZER_FILES)
    card = {
        "base": folder.name,
        "base_sha256": base_sha256,
        "base_tokenizer_sha256": fingerprint_tokenizer(folder),
        **({"source": read_card(folder)["source"]} if "source" in read_card(folder) else {}),
    }
    write_descriptions(staging, base.config, extended, digests, card)
    return extension


def write_descriptions(
    staging: Path, config: dict[str, Any], extended: ExtendedSource, digests: dict[str, str], card: dict[str, Any]
) -> None:
    """Write config.json, generation_config.json, the chat template and the card of an extended base."""
    extension = extended.extension
    config = config | {"vocab_size": extension.matrix_rows}
    generation = read_object_if_there(staging / "generation_config.json")
    if extension.pad_token_id is not None:
        config["pad_token_id"] = generation["pad_token_id"] = extension.pad_token_id
    if extension.turn_end_id is not None:
        eos = generation.get("eos_token_id", config.get("eos_token_id"))
        known = [eos] if isinstance(eos, int) else list(eos or [])
        generation["eos_token_id"] = list(dict.fromkeys([*known, extension.turn_end_id]))
    settings = read_object_if_there(staging / "tokenizer_config.json")
    if "chat_template" not in settings and not (staging / "chat_template.jinja").is_file():
        settings["chat_template"] = CHAT_TEMPLATE
        write_json(staging / "tokenizer_config.json", settings)
    write_json(staging / "generation_config.json", generation)
    card |= {
        "first_added_row": extension.first_row,
        "added_rows": len(extension.new),
        "padding_rows": extension.padding_rows,
        "vocab": extension.report.kind,
        "vocab_init": extended.vocab.init.name,
        "tokenizer_sha256": fingerprint_tokenizer(staging),
        "weights_sha256": combine(config, extended.specs.values(), digests),
    }
    seal_card(staging, card)
    write_json(staging / "config.json", config)


def narrow_rows(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 rows in the matrix's type, held within its finite range."""
    limit = torch.finfo(dtype).max
    return rows.clamp(-limit, limit).to(dtype)


def link_or_copy(source: Path, target: Path, copy: bool) -> None:
    """Hard-link a file, or copy it.

    Raises:
        ModelError: the two places are on different file systems, so no link can be made.
    """
    if copy:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        raise ModelError(
            f"{source.name} cannot be hard-linked from {source.parent} ({error.strerror}); use copy=true."
        ) from error
