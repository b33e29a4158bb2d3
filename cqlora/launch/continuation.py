"""Training an adapter on: what its files fix, compared with what was composed, before anything heavy is imported.

Rank, alpha, method, adapted layers and embeddings are the adapter's, and cannot change under weights that were
trained with them; dropout can.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cqlora.base import ADAPTER_CONFIG as CONFIG
from cqlora.base import ADAPTER_WEIGHTS as WEIGHTS
from cqlora.base import CARD, Base, read_card
from cqlora.config.choices import AdapterMethod, Embeddings, RopeScaling
from cqlora.config.schema import RunConfig, SftConfig
from cqlora.errors import ConfigError, ModelError
from cqlora.plan.shapes import adapted_matrices, block_matrices
from cqlora.positions import read_positions

if TYPE_CHECKING:
    # Brings numpy, which a plan does without.
    from cqlora.data.templates import ChatForm

_EMBEDDING_MODULES = {"embed_tokens", "lm_head"}


@dataclass(frozen=True, slots=True)
class Fixed:
    """What an adapter's files fix for whoever trains it on."""

    rank: int
    alpha: float
    method: AdapterMethod
    """none of an adapter of embeddings alone; never PiSSA, whose adapters end as plain LoRA on the untouched base."""
    target_modules: frozenset[str]
    """Names of the blocks' layers that carry low-rank matrices."""
    embeddings: Embeddings
    rows: frozenset[int]
    """Rows of the embedding matrices that train, under `new_rows`."""
    positions: tuple[RopeScaling, float] = (RopeScaling.none, 1.0)
    """How the base's positions were scaled, and by what factor."""
    form: "ChatForm | None" = None
    """How conversations were written, where it was instruction-tuned."""


def check_continuation(config: RunConfig, fixed: Fixed, base: Base | None) -> None:
    """Refuse a settled configuration that contradicts the adapter to continue.

    Raises:
        ModelError: the adapter's rows are not the base's added ones.
        ConfigError: composed values that are not the adapter's; the sentence names both, and what to type.
    """
    folder = Path(config.stage.init_adapter)
    different = list_differences(config, fixed)
    if fixed.form is not None and base is not None and not different:
        check_form(config, fixed.form, base, folder)
    if different:
        differences = ", ".join(f"{key}={theirs} and not {ours}" for key, theirs, ours in different)
        typed = " ".join(f"{key}={theirs}" for key, theirs, _ in different)
        raise ConfigError(
            f"stage.init_adapter={folder} was trained with {differences}; type {typed} to continue it, or merge it "
            "into its base and train a new adapter on that."
        )
    if fixed.embeddings is Embeddings.new_rows and base is not None:
        check_rows(fixed, base, folder)


def list_differences(config: RunConfig, fixed: Fixed) -> list[tuple[str, str, str]]:
    """Keys whose composed value is not the adapter's: key, the adapter's value and the composed one, as typed."""
    lora, model, (scaling, factor) = config.lora, config.model, fixed.positions
    # Low-rank matrices may come beside embeddings that trained alone.
    adds = fixed.method is AdapterMethod.none
    asked = frozenset(adapted_matrices(config.model, lora))
    return [
        (key, theirs, ours)
        for key, same, theirs, ours in (
            ("lora.rank", adds or lora.rank == fixed.rank, str(fixed.rank), str(lora.rank)),
            ("lora.alpha", adds or lora.alpha == fixed.alpha, f"{fixed.alpha:g}", f"{lora.alpha:g}"),
            ("lora.method", adds or lora.method is fixed.method, fixed.method.name, lora.method.name),
            (
                "lora.target_modules",
                adds or asked == fixed.target_modules,
                _as_typed(config, fixed.target_modules),
                _as_typed(config, asked),
            ),
            (
                "stage.embeddings",
                config.stage.embeddings is fixed.embeddings,
                fixed.embeddings.name,
                config.stage.embeddings.name,
            ),
            ("model.rope_scaling", model.rope_scaling is scaling, scaling.name, model.rope_scaling.name),
            ("model.rope_factor", model.rope_factor == factor, f"{factor:g}", f"{model.rope_factor:g}"),
            *_list_template(config, fixed),
        )
        if not same
    ]


def _list_template(config: RunConfig, fixed: Fixed) -> list[tuple[str, bool, str, str]]:
    """The template, where both stages have one, as list_differences compares it."""
    if fixed.form is None or not isinstance(config.stage, SftConfig):
        return []
    ours, theirs = config.stage.template, fixed.form.name
    return [("stage.template", ours is theirs, theirs.name, ours.name)]


def check_form(config: RunConfig, form: "ChatForm", base: Base, folder: Path) -> None:
    """Raise ConfigError where a template of the same name is another text than the adapter was tuned in."""
    from cqlora.data.templates import form_of_stage

    ours = form_of_stage(config.stage, base.path)
    if isinstance(config.stage, SftConfig) and ours.source != form.source:
        raise ConfigError(
            f"stage.init_adapter={folder} was tuned in another text of stage.template={form.name.name} than "
            f"{base.path} has now; put back its chat template, or merge the adapter and train a new one on that."
        )


def read_fixed(folder: Path) -> Fixed:
    """What the files of an adapter folder fix.

    Raises:
        ModelError: no adapter, or files that are damaged.
    """
    from cqlora.data.templates import form_of_tuning

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"stage.init_adapter={folder} has no {name}; give the adapter/ folder of a finished run.")
    try:
        written: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        names = _read_names(folder / WEIGHTS)
        rows = written.get("trainable_token_indices") or {}
        of_matrices = rows.values() if isinstance(rows, dict) else [rows]
        low_rank = {_module_of(name) for name in names if ".lora_A." in name}
        return Fixed(
            rank=int(written["r"]),
            alpha=float(written["lora_alpha"]),
            method=_method_of(written) if any(".lora_" in name for name in names) else AdapterMethod.none,
            target_modules=frozenset(low_rank - _EMBEDDING_MODULES),
            embeddings=_embeddings_of(names),
            rows=frozenset(row for each in of_matrices for row in each),
            positions=read_positions(read_card(folder), folder / CARD),
            form=form_of_tuning(folder),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"stage.init_adapter={folder} is damaged ({type(error).__name__} in its {CONFIG} or {WEIGHTS}); give the "
            "adapter/ folder of a finished run."
        ) from error


def check_rows(fixed: Fixed, base: Base, folder: Path) -> None:
    """Raise ModelError unless the adapter's rows are those that the base was extended by."""
    first = base.first_added_row or 0
    added = frozenset(range(first, first + base.added_rows))
    if fixed.rows != added:
        raise ModelError(
            f"stage.init_adapter={folder} trains {len(fixed.rows)} rows of the embeddings, from row {min(fixed.rows)}, "
            f"and {base.path} was extended by {len(added)} others; give the base that it was trained on."
        )


def _as_typed(config: RunConfig, names: frozenset[str]) -> str:
    every = block_matrices(config.model)
    ordered = [name for name in every if name in names] + sorted(names - every.keys())
    return "[all]" if names == every.keys() else f"[{','.join(ordered)}]"


def _method_of(written: dict[str, Any]) -> AdapterMethod:
    if written.get("use_dora"):
        return AdapterMethod.dora
    return AdapterMethod.rslora if written.get("use_rslora") else AdapterMethod.lora


def _embeddings_of(names: Iterable[str]) -> Embeddings:
    """What of the embeddings an adapter's weights are, by their names in PEFT."""
    found = Embeddings.frozen
    for name in names:
        if ".token_adapter." in name:
            return Embeddings.new_rows
        if ".lora_embedding_A" in name or (".lora_A." in name and _module_of(name) in _EMBEDDING_MODULES):
            return Embeddings.lora
        if name.endswith(tuple(f"{module}.weight" for module in _EMBEDDING_MODULES)):
            found = Embeddings.full
    return found


def _module_of(name: str) -> str:
    """The layer's own name in a weight's name: `up_proj` of `….layers.0.mlp.up_proj.lora_A.weight`."""
    return name.partition(".lora_")[0].rpartition(".")[2]


def _read_names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file, of which the header alone is read."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError("the header is longer than the file")
        header: dict[str, Any] = json.loads(stream.read(length))
    return [name for name in header if name != "__metadata__"]
