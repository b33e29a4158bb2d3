"""Merge adapters into a base by streaming: one matrix's rows are in memory, the result appears whole or not at all."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from cqlora.base import CARD, README, Base, check_companions, read_base, read_card, seal_card
from cqlora.config.choices import GgufType, MergeOnto, ModelFormat, Precision, Quantization
from cqlora.config.differences import DifferenceConfig
from cqlora.data.rendered import TemplateEncoder
from cqlora.data.templates import FORM_KEYS
from cqlora.data.tokenizer import PlainTokenizer
from cqlora.errors import ConfigError, ModelError
from cqlora.model_card import page_of_merge
from cqlora.positions import scale_as_trained
from cqlora.system.documents import NAMED_TEMPLATES, carry_over, read_object_if_there, write_json
from cqlora.system.durable import staged_folder
from cqlora.system.fingerprints import combine
from cqlora.system.model_config import INPUT, OUTPUT
from cqlora.system.shards import ShardReader, write_shards
from cqlora.system.tensor_files import INDEX, read_tensors
from cqlora.weights.merge_adapter import Adapter, open_adapter
from cqlora.weights.merge_difference import ModelPair, open_pair, spoken_ends, spoken_form, spoken_template
from cqlora.weights.merge_lineage import MERGED, check_lineage, merged_card, read_training, tuned_form
from cqlora.weights.merge_plan import MergedSource, MergePlan, holds_same
from cqlora.weights.nf4 import Nf4Format
from cqlora.weights.sizes import parse_size

_REWRITTEN = {CARD, INDEX, README, "config.json"}


class OutputOptions(Protocol):
    """What `cqlora merge` lets a user choose of the files; see its schema."""

    format: ModelFormat
    gguf_type: GgufType
    double_quantization: bool
    precision: Precision
    max_shard_size: str


@dataclass(frozen=True, slots=True)
class Merge:
    """A base with its adapters, checked, nothing written yet."""

    base: Base
    adapters: list[Adapter]
    source: MergedSource
    onto: MergeOnto
    averaged: bool = False
    """The adapters are alternatives of which the mean is merged, and not one trained after the other."""
    pairs: list[ModelPair] = field(default_factory=list)
    """Models whose differences are added."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, or is worth knowing, a sentence each."""

    def trained_config(self) -> dict[str, Any]:
        """`config.json` of the base as the adapters were trained on it, its positions scaled where they were."""
        cards = [(adapter.card, adapter.described / CARD) for adapter in self.adapters]
        return scale_as_trained(self.base.config, cards, self.base.path)

    def config(self) -> dict[str, Any]:
        """`config.json` of the merged model."""
        return self.trained_config() | {"tie_word_embeddings": self.source.plan.tied}

    def template(self) -> str:
        """The chat template in place of the base's own; empty: the base's stays.

        An adapter that was instruction-tuned brings the one that it was tuned in, else a difference that of its model.
        """
        form = tuned_form(self.adapters)
        if form is not None:
            return form.write(self.base.path)
        spoken = self.spoken()
        return spoken[0] if spoken else ""

    def spoken(self) -> tuple[str, ModelPair] | None:
        """The template that a difference brings, and the difference; None where an adapter's or the base's stands."""
        return spoken_template(self.pairs, self.base) if tuned_form(self.adapters) is None else None

    def ends(self) -> list[int]:
        """Ids that end a reply in the template that is put in place of the base's own, beside the base's."""
        spoken, form = self.spoken(), tuned_form(self.adapters)
        if form is not None and form.source:
            return [TemplateEncoder(PlainTokenizer(self.base.path), self.base.path, form.source).end]
        return spoken_ends(spoken[1]) if spoken else []

    def card(self) -> dict[str, Any]:
        """What `cqlora.json` says of it; the fingerprint of the weights is yet to come."""
        card = merged_card(self.base, self.adapters, self.onto, self.averaged, self.source.plan.weight)
        if self.pairs:
            card[MERGED] |= {"added": [*card[MERGED].get("added", []), *(pair.describe() for pair in self.pairs)]}
            card["added_from"] = [[str(pair.model.path), str(pair.minus.path), pair.weight] for pair in self.pairs]
            spoken = self.spoken()
            if spoken is not None:
                card = {key: value for key, value in card.items() if key not in FORM_KEYS} | spoken_form(spoken[1])
        return card

    def summary(self) -> str:
        """What was merged and into how much of the base, as one sentence."""
        count, pairs = len(self.adapters), len(self.pairs)
        told = f"{count} adapter{'s' * (count != 1)} {'averaged and ' if self.averaged else ''}merged"
        told += f", {pairs} difference{'s' * (pairs != 1)} added" if pairs else ""
        reached = sum(bool(self.source.plan.changes.get(name)) for name in self.source.specs)
        return f"{told}, into {reached} of {len(self.source.specs)} tensors."


def plan_merge(
    base_folder: Path,
    folders: list[Path],
    onto: MergeOnto,
    double_quantization: bool,
    precision: Precision,
    averaged: bool = False,
    weight: float = 1.0,
    differences: Sequence[DifferenceConfig] = (),
) -> Merge:
    """Read headers and cards, and find each weight of the adapters and of the differences its place.

    `averaged`: the mean of what the adapters add is merged; `weight` multiplies what they add, the rows of tokens
    that an extension added excepted; `differences` are added to what comes of it.

    Raises:
        ConfigError: onto=nf4 for an adapter that was not trained so.
        ModelError: a folder without a model or an adapter, or ones that do not belong together.
    """
    base, adapters = read_base(base_folder), [open_adapter(folder) for folder in folders]
    if "quantization_config" in base.config:
        raise ModelError(f"base={base_folder} is quantised already; give the 16-bit model that it was made from.")
    reader = ShardReader(base_folder)
    if INPUT not in reader.specs:
        raise ModelError(f"{base_folder} has no {INPUT}, so it is no LLaMA model; give another base.")
    lineage = check_lineage(base, adapters, averaged, weight)
    plan = MergePlan(tied=is_tied(base, reader), weight=weight, added_rows=base.added)
    pairs = [open_pair(difference, base, plan.tied) for difference in differences]
    if averaged:
        plan.add(adapters, base_folder, reader.specs)
    for adapter, apart in () if averaged else zip(adapters, lineage.apart, strict=True):
        plan.add([adapter], base_folder, reader.specs, apart)
    for pair in pairs:
        plan.add_difference(pair)
    form = choose_format(adapters, onto, double_quantization, precision, averaged)
    merge = Merge(base, adapters, MergedSource(reader, plan, form), onto, averaged, pairs, lineage.notes)
    # Before anything is written: the adapters' cards may tell of positions that no model has.
    merge.config()
    return merge


def check_what_goes_along(merge: Merge, remedy: str, accepted: Sequence[str] = ()) -> None:
    """Refuse a base whose companions are not as they were when it, or an adapter on it, was written.

    An adapter that was trained on what the base became with others has seen companions of that.

    Raises:
        ModelError: see above; `remedy` and `accepted` are those of `check_companions`.
    """
    base, merged = merge.base.path, read_card(merge.base.path).get(MERGED)
    on_it = [adapter.folder for adapter in merge.adapters if adapter.card.get("base_merged") == merged]
    for folder in (base, *on_it):
        check_companions(base, folder, remedy, accepted)


def is_tied(base: Base, reader: ShardReader) -> bool:
    """Whether one matrix stands for both embeddings, by the configuration and, as transformers 5 does, the files."""
    if not base.tied and OUTPUT not in reader.specs:
        raise ModelError(f"{base.path} has no {OUTPUT} and is not tied; its weights are not whole, fetch it again.")
    return base.tied and (OUTPUT not in reader.specs or holds_same(reader, INPUT, OUTPUT))


def choose_format(
    adapters: list[Adapter], onto: MergeOnto, double_quantization: bool, precision: Precision, averaged: bool
) -> Nf4Format | None:
    """The NF4 form that the adapter was trained on, where the merge is onto that."""
    if onto is MergeOnto["16bit"]:
        return None
    trainings = [read_training(adapter, double_quantization, precision) for adapter in adapters]
    if len(adapters) != 1 and not (averaged and all(training == trainings[0] for training in trainings)):
        raise ConfigError(
            f"onto=nf4 takes one adapter and adapter= has {len(adapters)}; merge them one after the other, each into "
            "what the merge before it wrote."
        )
    trained_on, form = trainings[0]
    if trained_on is not Quantization.nf4:
        raise ConfigError(
            f"onto=nf4, but {adapters[0].folder} was trained with model.quantization={trained_on.name}; use onto=16bit."
        )
    return form


def write_merge(merge: Merge, output_dir: Path, options: OutputOptions) -> None:
    """Write the merged model in one of the formats; the folder appears whole or not at all.

    Raises:
        ModelError: `output_dir` is already there, the disk is full, or the format has no place for the model.
    """
    with staged_folder(output_dir) as staging:
        card = merge.card()
        if options.format is ModelFormat.gguf:
            from cqlora.weights.gguf_write import write_gguf
            from cqlora.weights.modelfile import write_modelfile

            file = staging / f"{output_dir.name}.{options.gguf_type.value}.gguf"
            write_gguf(file, merge.source, merge.config(), merge.base.path, options.gguf_type, merge.template())
            write_modelfile(staging, file.name, merge.base.path, merge.config(), merge.template())
            write_page(merge, staging, output_dir.name)
            seal_card(staging, card)
        else:
            write_model(merge, staging, options, card, output_dir.name)


def write_model(merge: Merge, folder: Path, options: OutputOptions, card: dict[str, Any], name: str) -> str:
    """Fill an empty folder with the merged model in Hugging Face form, its card sealed last; return its fingerprint."""
    config, digests = write_folder(merge, folder, options)
    carry_over(merge.base.path, folder, _REWRITTEN)
    if merge.template():
        write_template(folder, merge.template())
    if ends := merge.ends():
        write_ends(folder, config, ends)
    write_json(folder / "config.json", config)
    write_page(merge, folder, name, "transformers")
    fingerprint = combine(config, read_tensors(folder).values(), digests)
    seal_card(folder, card | {"weights_sha256": fingerprint})
    return fingerprint


def write_page(merge: Merge, folder: Path, name: str, library: str = "") -> None:
    """Write the merged model's card for people, from what those of the base and the adapters say."""
    base, *adapters = (
        file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        for file in (place / README for place in (merge.base.path, *(each.described for each in merge.adapters)))
    )
    page = page_of_merge(name, merge.base.path, library, base, adapters)
    (folder / README).write_text(page, encoding="utf-8")


def write_folder(merge: Merge, staging: Path, options: OutputOptions) -> tuple[dict[str, Any], dict[str, str]]:
    """Write the weights as safetensors in 16 bits or NF4; return config.json of them, and sha256 of each tensor."""
    source, max_shard_size = merge.source, parse_size("max_shard_size", options.max_shard_size)
    if options.format is ModelFormat.safetensors:
        with one_thread():
            specs = source.specs.values()
            return merge.config(), write_shards(staging, specs, lambda spec: source.blocks(spec.name), max_shard_size)
    from cqlora.model.load import COMPUTE_DTYPES
    from cqlora.weights.nf4_folder import nf4_folder_config, write_nf4_folder

    form = Nf4Format(options.double_quantization, COMPUTE_DTYPES[options.precision])
    return nf4_folder_config(merge.config(), form), write_nf4_folder(staging, source, form, max_shard_size)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in this thread alone meanwhile.

    A block's few operations are bound by memory, and another thread writes; several threads to an operation wait
    for each other a thousand times, which on a machine that has other work takes two to four times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_template(folder: Path, template: str) -> None:
    """Put a chat template in place of the folder's own."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    shutil.rmtree(folder / NAMED_TEMPLATES, ignore_errors=True)
    file = folder / "tokenizer_config.json"
    write_json(file, read_object_if_there(file) | {"chat_template": template})


def write_ends(folder: Path, config: dict[str, Any], ends: list[int]) -> None:
    """Let a reply end at what ends one of the model whose chat template goes along, beside what ended the base's."""
    file = folder / "generation_config.json"
    generation = read_object_if_there(file)
    own = generation.get("eos_token_id", config.get("eos_token_id"))
    known = [own] if isinstance(own, int) else list(own or [])
    write_json(file, generation | {"eos_token_id": list(dict.fromkeys([*known, *ends]))})
