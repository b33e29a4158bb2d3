"""An adapter in two: trained rows and whole matrices go into the base, the low-rank ones stay beside it as plain LoRA.

vLLM (peft_helper.py, lora_model.py) refuses trained rows, modules saved whole and DoRA, and reads one rank and one
alpha for all layers: it passes over patterns without a word.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from cqlora.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, README, fingerprint_tokenizer, read_card, seal_card
from cqlora.config.choices import Embeddings, MergeOnto, ModelFormat, Quantization
from cqlora.errors import ModelError
from cqlora.system.companions import hash_companions
from cqlora.system.documents import copy_inside, write_json
from cqlora.system.durable import staged_folder
from cqlora.system.model_config import INPUT
from cqlora.system.shards import DTYPES, TensorSpec, write_shard
from cqlora.weights.merge import Merge, OutputOptions, write_model
from cqlora.weights.merge_adapter import Adapter
from cqlora.weights.merge_changes import Change, LowRank
from cqlora.weights.merge_lineage import MERGED
from cqlora.weights.nf4 import is_block_matrix

BASE, ADAPTER = "base", "adapter"
"""The two folders that come out."""
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be (vllm.config.lora, MaxLoRARanks)."""


@dataclass(frozen=True, slots=True)
class PlainLora:
    """The low-rank matrices of an adapter, all of one rank and one scaling once they are written."""

    adapter: Adapter
    changes: dict[str, LowRank]
    """By the tensor of the base that each is added to."""

    @property
    def rank(self) -> int:
        """Of the largest."""
        return max(change.reader.specs[change.down].shape[0] for change in self.changes.values())

    @property
    def has_patterns(self) -> bool:
        """Whether ranks or alphas differ by layer, or might."""
        return bool(self.adapter.config.get("rank_pattern") or self.adapter.config.get("alpha_pattern"))

    def tensors(self) -> dict[str, tuple[LowRank, bool]]:
        """Each tensor's name in PEFT, what it is of, and whether it is B."""
        return {
            f"base_model.model.{name.removesuffix('.weight')}.lora_{'AB'[is_up]}.weight": (change, bool(is_up))
            for name, change in self.changes.items()
            for is_up in (0, 1)
        }

    def spec(self, name: str) -> TensorSpec:
        """A tensor as it is written: where there are patterns, of the largest rank."""
        change, is_up = self.tensors()[name]
        stored = change.reader.specs[change.up if is_up else change.down]
        rank = self.rank if self.has_patterns else stored.shape[int(is_up)]
        return TensorSpec(name, stored.dtype, (stored.shape[0], rank) if is_up else (rank, stored.shape[1]))

    def read(self, spec: TensorSpec) -> torch.Tensor:
        """A or B: where there are patterns, zeros fill it up to the rank and B has the scaling."""
        change, is_up = self.tensors()[spec.name]
        stored = change.reader.read(change.up if is_up else change.down)
        if is_up and self.has_patterns:
            stored = (stored.float() * change.scaling).to(stored.dtype)
        rows, columns = (wanted - there for wanted, there in zip(spec.shape, stored.shape, strict=True))
        return pad(stored, (0, columns, 0, rows))

    def served_rank(self) -> int:
        """The `--max-lora-rank` that vLLM needs."""
        return next(rank for rank in SERVED_RANKS if rank >= self.rank)


def part_lora(merge: Merge) -> PlainLora:
    """Take the low-rank matrices of the blocks out of what a merge of one adapter puts into the base.

    Raises:
        ModelError: DoRA, a rank that is not served, or an adapter of which nothing would be left or nothing put in.
    """
    (adapter,), plan, specs = merge.adapters, merge.source.plan, merge.source.specs
    parted = PlainLora(adapter, {})
    for name in [name for name in plan.changes if is_block_matrix(specs[name])]:
        kept: list[Change] = []
        for change in plan.changes[name]:
            if not isinstance(change, LowRank):
                kept.append(change)
            elif change.magnitude:
                raise ModelError(f"adapter={adapter.folder} is DoRA, which vLLM does not serve; leave out rows=only.")
            else:
                parted.changes[name] = change
        plan.changes[name] = kept
    if not parted.changes:
        raise ModelError(f"adapter={adapter.folder} has no low-rank matrices to leave beside it; leave out rows=only.")
    if parted.rank > SERVED_RANKS[-1]:
        raise ModelError(
            f"adapter={adapter.folder} has rank {parted.rank}, and vLLM serves up to {SERVED_RANKS[-1]}; leave out "
            "rows=only."
        )
    if not (any(plan.changes.values()) or parted.has_patterns or merge.onto is MergeOnto["nf4"]):
        raise ModelError(
            f"adapter={adapter.folder} is plain LoRA already, so rows=only would copy the base; serve it as it is: "
            f"vllm serve {merge.base.path} --enable-lora --max-lora-rank {parted.served_rank()} --lora-modules "
            f"NAME={adapter.folder}"
        )
    return parted


def write_parts(merge: Merge, lora: PlainLora, output_dir: Path, options: OutputOptions) -> None:
    """Write `output_dir`/base and `output_dir`/adapter; both appear whole or not at all.

    Raises:
        ModelError: `output_dir` is already there.
        DiskError: the disk is full.
    """
    with staged_folder(output_dir) as staging:
        base, adapter = staging / BASE, staging / ADAPTER
        base.mkdir()
        adapter.mkdir()
        fingerprint = write_model(merge, base, options, describe_base(merge), f"{output_dir.name}, the base")
        write_lora(lora, adapter, merge, output_dir / BASE)
        if (page := lora.adapter.described / README).is_file():
            copy_inside(page, adapter / README)
        card = describe_adapter(merge, lora, base, options)
        seal_card(adapter, card | {"base": str(output_dir / BASE), "base_sha256": fingerprint})


def describe_base(merge: Merge) -> dict[str, Any]:
    """The card of the base with the rows: it was merged from the adapter, but not from all of it."""
    card = merge.card()
    history = card[MERGED]
    *before, last = history["adapters"]
    return card | {MERGED: history | {"adapters": [*before, last | {"rows": "only"}]}}


def describe_adapter(merge: Merge, lora: PlainLora, base: Path, options: OutputOptions) -> dict[str, Any]:
    """The card of the plain adapter: what its own said, on the base that was just written, after the whole one."""
    card, fingerprint = lora.adapter.card, lora.adapter.fingerprint()
    said = {"adapter": card["adapter"] | {"embeddings": Embeddings.frozen.name}} if "adapter" in card else {}
    if "trained_on" in card:
        said["trained_on"] = card["trained_on"] | describe_holding(merge, options)
    return {
        **card,
        **said,
        "tokenizer_sha256": fingerprint_tokenizer(base),
        "companions": hash_companions(base),
        "base_merged": read_card(base)[MERGED],
        "init_adapter": {"path": str(lora.adapter.folder), "adapter_sha256": fingerprint},
        "lineage": [*card.get("lineage", []), {"adapter_sha256": fingerprint, "how": "rows_merged"}],
    }


def describe_holding(merge: Merge, options: OutputOptions) -> dict[str, Any]:
    """How the new base is to be held beneath the adapter, where that is not as in training."""
    if options.format is ModelFormat.nf4:
        double = options.double_quantization
        return {"quantization": Quantization.nf4.name, "double_quantization": double, "dtype": options.precision.value}
    if merge.onto is MergeOnto["16bit"]:
        return {}
    dtype = str(DTYPES[merge.source.base.specs[INPUT].dtype]).removeprefix("torch.")
    return {"quantization": Quantization.none.name, "double_quantization": False, "dtype": dtype}


def write_lora(lora: PlainLora, folder: Path, merge: Merge, base: Path) -> None:
    """Write the adapter's two files; its configuration holds what every loader of PEFT's form knows, and no more."""
    config, linear = lora.adapter.config, filter(is_block_matrix, merge.source.base.specs.values())
    own = {"r": config["r"], "lora_alpha": config["lora_alpha"], "use_rslora": bool(config.get("use_rslora"))}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "target_modules": name_targets(lora.changes, [spec.name for spec in linear]),
        **({"r": lora.rank, "lora_alpha": lora.rank, "use_rslora": False} if lora.has_patterns else own),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / ADAPTER_CONFIG, settings)
    write_shard(folder / ADAPTER_WEIGHTS, list(map(lora.spec, lora.tensors())), lambda spec: [lora.read(spec)])


def name_targets(adapted: Iterable[str], linear: Iterable[str]) -> list[str]:
    """Layers' own names where all layers so called are adapted, else the whole path of each."""
    modules = {name.removesuffix(".weight") for name in adapted}
    kinds = {module.rpartition(".")[2] for module in modules}
    so_called = {
        name.removesuffix(".weight") for name in linear if name.removesuffix(".weight").rpartition(".")[2] in kinds
    }
    return sorted(kinds if so_called == modules else modules)


def tell_parts(merge: Merge, lora: PlainLora, output_dir: Path) -> str:
    """What came out, and how vLLM serves it."""
    baked = sum(bool(merge.source.plan.changes.get(name)) for name in merge.source.specs)
    base, adapter = output_dir / BASE, output_dir / ADAPTER
    return (
        f"{base}: {baked} of {len(merge.source.specs)} tensors changed; {adapter}: plain LoRA of rank {lora.rank} on "
        f"{len(lora.changes)} matrices.\nvllm serve {base} --enable-lora --max-lora-rank {lora.served_rank()} "
        f"--lora-modules {output_dir.name}={adapter}"
    )
