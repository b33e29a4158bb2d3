"""An adapter folder read as changes to matrices of a base: every weight of it in one change, or an error.

PEFT's names (peft, utils/save_and_load.py): the module's path behind `base_model.model.`, then `lora_A.weight`
and `lora_B.weight`, for an embedding `lora_embedding_A` and `lora_embedding_B`, `lora_magnitude_vector` (DoRA),
`token_adapter.trainable_tokens_delta`; a module that is saved whole keeps its own names.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqlora.base import ADAPTER_CONFIG as CONFIG
from cqlora.base import ADAPTER_WEIGHTS as WEIGHTS
from cqlora.base import read_card
from cqlora.errors import ModelError
from cqlora.system.documents import read_object, shorten, take, take_number
from cqlora.system.durable import recover_folders
from cqlora.system.fingerprints import hash_whole
from cqlora.system.shards import ShardReader
from cqlora.weights.merge_changes import Change, LowRank, Replacement, TokenRows
from cqlora.weights.merge_checkpoint import TRAINED, adapter_of_run, is_checkpoint, open_checkpoint

ROWS = "token_adapter.trainable_tokens_delta"
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.(?:(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?"
    r"|(?P<rows>token_adapter\.trainable_tokens_delta)|(?:base_layer\.)?(?P<whole>weight|bias))"
)
_UNMERGEABLE = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "monteclora_config", "target_parameters", "use_bdlora", "use_qalora",
)  # fmt: skip
"""Options of PEFT's LoRA that compute something else than a matrix plus a product of two."""
_MOVED_BASES = ("corda", "lora_ga", "loftq", "mica", "olora", "pissa")
"""Initialisations that train on a changed base; PEFT's conversion to a plain LoRA removes the name."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter folder in PEFT's form, or a checkpoint that holds the same."""

    folder: Path
    described: Path
    """Folder of the adapter_config.json and cqlora.json that say what it is."""
    config: dict[str, Any]
    card: dict[str, Any]
    """cqlora.json, or nothing beside an adapter that another program wrote."""
    reader: ShardReader

    @property
    def of_checkpoint(self) -> bool:
        """Whether it lies in a run's checkpoint, and not in a folder of its own."""
        return self.folder != self.described

    def fingerprint(self) -> str:
        """sha256 that tells the adapter's weights from others."""
        return hash_whole(self.folder / (TRAINED if self.of_checkpoint else WEIGHTS))


def open_adapter(folder: Path) -> Adapter:
    """Read the configuration, card and header of an adapter, or of the one in a checkpoint.

    Raises:
        ModelError: no adapter, weights that are truncated, or a method that cannot be merged.
    """
    recover_folders(folder.parent)
    if is_checkpoint(folder):
        described = adapter_of_run(folder)
        config, card, reader = open_checkpoint(folder)
        adapter = Adapter(folder, described, config, card, reader)
    else:
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise ModelError(f"adapter={folder} has no {name}; give the adapter/ folder of a finished run.")
        reader = ShardReader(folder, folder / WEIGHTS)
        adapter = Adapter(folder, folder, read_object(folder / CONFIG), read_card(folder), reader)
    refuse_unmergeable(adapter)
    return adapter


def refuse_unmergeable(adapter: Adapter) -> None:
    """Raise ModelError for an adapter that is damaged, empty, or no change of the base's weights."""
    config, folder = adapter.config, adapter.folder
    check_config(config, adapter.described / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"adapter={folder} is of kind {config.get('peft_type')}; only LoRA and its kin can be merged.")
    options = [name for name in _UNMERGEABLE if config.get(name)]
    if options:
        raise ModelError(
            f"adapter={folder} uses {options[0]}, which is no change of the base's weights; use it without merging."
        )
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_MOVED_BASES):
        raise ModelError(
            f"adapter={folder} was trained on a base that init_lora_weights={init} had changed; save it as a plain "
            "LoRA first (PEFT: path_initial_model_for_weight_conversion)."
        )
    if not adapter.reader.specs:
        raise ModelError(f"adapter={folder} holds no weights; give the adapter/ folder of a finished run.")


def check_config(config: dict[str, Any], file: Path) -> None:
    """Refuse an adapter_config.json whose numbers or patterns are missing, of another type or impossible.

    Raises:
        ModelError: see above.
    """
    take_number(config, "r", file, 1, 1 << 20)
    take_number(config, "lora_alpha", file, -1e12, 1e12, float)
    for key in ("use_rslora", "use_dora", "ensure_weight_tying"):
        take(config, key, file, bool, default=None)
    for key, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        patterns = take(config, key, file, dict, default={})
        for pattern in patterns:
            take_number(patterns, pattern, file, -1e12 if kind is float else 1, 1e12, kind)
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ModelError(
                    f"{file} has {key} of {shorten(pattern)}, no pattern ({error}); fetch it again."
                ) from error
    rows = take(config, "trainable_token_indices", file, (dict, list), default={})
    for indices in rows.values() if isinstance(rows, dict) else [rows]:
        whole = isinstance(indices, list) and all(type(index) is int for index in indices)
        if not whole or len(set(indices)) < len(indices):
            raise ModelError(f"{file} has trainable_token_indices that are no rows, each named once; fetch it again.")


def find_changes(adapter: Adapter, base: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Change]]:
    """What the adapter does to each tensor of a base, in order; every weight of it has its place there.

    `shapes` are the base's tensors, of both embedding matrices even where one stands for both.

    Raises:
        ModelError: weights that have no place in the base, or that do not fit theirs.
    """
    changes: dict[str, list[Change]] = {}
    left: list[str] = []
    for module, parts in _group_by_module(adapter.reader.specs).items():
        unused = dict(parts)
        for tensor, change in _read_module(adapter, module, unused):
            if tensor not in shapes:
                unused = dict(parts)
                break
            if not change.fits(shapes[tensor]):
                raise ModelError(
                    f"adapter={adapter.folder} does not fit {tensor} of {base}, which is {list(shapes[tensor])}; give "
                    "the base that it was trained on."
                )
            changes.setdefault(tensor, []).append(change)
        left += unused.values()
    if left:
        raise ModelError(
            f"adapter={adapter.folder} has {len(left)} weights without a place in {base} ({', '.join(sorted(left)[:3])}"
            f"{' …' if len(left) > 3 else ''}); give the base that it was trained on."
        )
    return changes


def _group_by_module(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each module the stored name of each of its parts."""
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        module, part = (match["module"], match[match.lastgroup or ""]) if match else (name, "unknown")
        modules.setdefault(module, {})[part] = name
    return modules


def _read_module(adapter: Adapter, module: str, unused: dict[str, str]) -> Iterator[tuple[str, Change]]:
    """A module's tensors and changes in the order in which PEFT computes them, taken out of `unused`."""
    reader = adapter.reader
    for whole in ("weight", "bias"):
        if whole in unused:
            yield f"{module}.{whole}", Replacement(reader, unused.pop(whole))
    for kind in ("lora_", "lora_embedding_"):
        if f"{kind}A" in unused and f"{kind}B" in unused:
            down, up = unused.pop(f"{kind}A"), unused.pop(f"{kind}B")
            magnitude = unused.pop("lora_magnitude_vector", None)
            _check_method(adapter, module, magnitude)
            scaling = _scaling(adapter, module, reader.specs[down].shape[0])
            if kind == "lora_":
                yield f"{module}.weight", LowRank(reader, up, down, scaling, magnitude, of_embedding=False)
            else:
                yield f"{module}.weight", LowRank(reader, down, up, scaling, magnitude, of_embedding=True)
    if ROWS in unused:
        yield f"{module}.weight", TokenRows(reader, unused.pop(ROWS), _row_indices(adapter, module))


def _check_method(adapter: Adapter, module: str, magnitude: str | None) -> None:
    """Raise ModelError where only one of the two files is DoRA's: PEFT would take another magnitude in silence."""
    if bool(magnitude) == bool(adapter.config.get("use_dora")):
        return
    has, says = ("a", "no ") if magnitude else ("no", "")
    raise ModelError(
        f"adapter={adapter.folder} has {has} lora_magnitude_vector of {module} and its {CONFIG} says {says}use_dora; "
        "the two files are not of one adapter, give a whole one."
    )


def _row_indices(adapter: Adapter, module: str) -> tuple[int, ...]:
    """Which rows of a module's matrix the adapter holds; a bare list is of the input embedding."""
    declared = adapter.config.get("trainable_token_indices") or {}
    by_module = declared if isinstance(declared, dict) else {"embed_tokens": declared}
    return next((tuple(rows) for name, rows in by_module.items() if f".{module}".endswith(f".{name}")), ())


def _scaling(adapter: Adapter, module: str, rank: int) -> float:
    """By what B·A is multiplied: alpha over the rank, or over its root (rsLoRA), by patterns where there are."""
    config = adapter.config
    expected, alpha = (
        _by_pattern(config.get(f"{key}_pattern") or {}, module, config[name])
        for key, name in (("rank", "r"), ("alpha", "lora_alpha"))
    )
    if rank != expected:
        raise ModelError(
            f"adapter={adapter.folder} has {module} of rank {rank} and its {CONFIG} says {expected}; the two files "
            "are not of one adapter, give a whole one."
        )
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that names the module's end (peft, get_pattern_key)."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, default)
