"""Which matrices change and how, over all adapters in a row; and the merged model as a source of tensors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cqlora.errors import ModelError
from cqlora.system.model_config import INPUT, OUTPUT
from cqlora.system.shards import DTYPES, ShardReader, TensorSpec
from cqlora.weights.merge_adapter import Adapter, find_changes
from cqlora.weights.merge_blend import blend
from cqlora.weights.merge_changes import Change, LowRank, RowStream, TokenRows
from cqlora.weights.merge_difference import ModelPair
from cqlora.weights.nf4 import Nf4Format, is_block_matrix, through_nf4

_CPU = torch.device("cpu")


@dataclass(slots=True)
class MergePlan:
    """The changes of each tensor, in order, and whether the embedding matrices are still one."""

    tied: bool
    weight: float = 1.0
    """By what is multiplied what an adapter adds."""
    added_rows: range = range(0)
    """Rows of the embedding matrices that an extension added, which are taken as trained whatever the weight."""
    changes: dict[str, list[Change]] = field(default_factory=dict)
    of_tied_base: bool = field(init=False)
    """Whether they were one in the base."""

    def __post_init__(self) -> None:
        self.of_tied_base = self.tied

    def add(
        self, adapters: Sequence[Adapter], base: Path, specs: Mapping[str, TensorSpec], apart: bool = False
    ) -> None:
        """Put an adapter's changes, or the mean of what several add, behind those that are there already.

        An adapter that was trained `apart`, on the base itself, can only be added up with them: what both put in
        place of the base's numbers, or rescale, would be lost of one of them.

        Raises:
            ModelError: see find_changes; or two that were trained apart and cannot be added up.
        """
        shapes = {name: spec.shape for name, spec in specs.items()}
        shapes |= {OUTPUT: shapes[INPUT]} if self.tied else {}
        found = [find_changes(adapter, base, shapes) for adapter in adapters]
        if self.tied:
            self._settle_tying(found, adapters)
        if apart:
            for changes, adapter in zip(found, adapters, strict=True):
                self._refuse_lost(changes, adapter)
        for name in dict.fromkeys(name for changes in found for name in changes):
            alternatives = [changes.get(name, []) for changes in found]
            whole = self.added_rows if name in (INPUT, OUTPUT) else range(0)
            self.changes.setdefault(name, []).extend(blend(alternatives, self.weight, whole))

    def add_difference(self, pair: ModelPair) -> None:
        """Put the difference of two models behind the changes that are there already."""
        for name, change in pair.changes(of_output=not self.tied):
            self.changes.setdefault(name, []).append(change)

    def _settle_tying(self, found: list[dict[str, list[Change]]], adapters: Sequence[Adapter]) -> None:
        """Make the embedding matrices two where an adapter parts them; say the same of all for both or for one."""
        alike = [
            changes_alike(changes.get(INPUT, []), changes.get(OUTPUT), adapter)
            for changes, adapter in zip(found, adapters, strict=True)
        ]
        self.tied = all(alike)
        if not self.tied:
            self.changes[OUTPUT] = list(self.changes.get(INPUT, []))
        for changes, same in zip(found, alike, strict=True):
            if self.tied:
                changes.pop(OUTPUT, None)
            elif same and INPUT in changes:
                changes[OUTPUT] = list(changes[INPUT])

    def _refuse_lost(self, found: Mapping[str, list[Change]], adapter: Adapter) -> None:
        parted = self.of_tied_base and not self.tied
        for name, changes in found.items():
            # What was one matrix in the base may have been changed for both its uses under the other's name.
            both = parted and name in (INPUT, OUTPUT)
            before = [
                change for known in ((INPUT, OUTPUT) if both else (name,)) for change in self.changes.get(known, [])
            ]
            sums = not both and all(is_sum(change) for change in (*before, *changes))
            if before and not sums:
                raise ModelError(
                    f"adapter={adapter.folder} was trained apart from those before it and both change {name} by more "
                    "than adding to it, so what one learned would be lost; merge one of them, or train the second "
                    "on what merging the first gives."
                )


def is_sum(change: Change) -> bool:
    """Whether a change adds the same to whatever matrix, so that several may be added up in any order."""
    return isinstance(change, LowRank) and change.magnitude is None


def changes_alike(of_input: list[Change], of_output: list[Change] | None, adapter: Adapter) -> bool:
    """Whether an adapter leaves tied embedding matrices one.

    PEFT lets trained rows of a tied input embedding stand for the output too, and whatever else the adapter was
    set to keep tied (`ensure_weight_tying`); other changes are of the one module that they name.
    """
    if of_output is None:
        follows = all(isinstance(change, TokenRows) for change in of_input)
        return follows or bool(adapter.config.get("ensure_weight_tying"))
    pairs = zip(of_input, of_output, strict=False)
    return len(of_input) == len(of_output) and all(mine.equals(its) for mine, its in pairs)


def holds_same(reader: ShardReader, name: str, other: str) -> bool:
    """Whether two tensors of a model are equal."""
    if reader.specs[name].shape != reader.specs[other].shape:
        return False
    return all(torch.equal(*blocks) for blocks in zip(reader.blocks(name), reader.blocks(other), strict=True))


@dataclass(frozen=True, slots=True)
class MergedSource:
    """A TensorSource: the base's tensors with the plan's changes, in the base's types."""

    base: ShardReader
    plan: MergePlan
    onto: Nf4Format | None
    """How the blocks' matrices were quantised while the adapter was trained; None takes them as they are."""
    device: torch.device = _CPU
    """Where they are quantised and changed; a GPU takes seconds for what a processor takes minutes for."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The base's tensors; an output matrix behind them where it no longer is the input's."""
        specs = dict(self.base.specs)
        if self.plan.tied:
            specs.pop(OUTPUT, None)
        elif OUTPUT not in specs:
            specs[OUTPUT] = TensorSpec(OUTPUT, specs[INPUT].dtype, specs[INPUT].shape)
        return specs

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The merged tensor's rows; those of a tensor that nothing changes as the base has them.

        Raises:
            ModelError: a merged number that the base's type cannot hold.
        """
        spec = self.specs[name]
        stored = name if name in self.base.specs else INPUT
        quantised = self.onto is not None and is_block_matrix(spec)
        if not quantised and not self.plan.changes.get(name):
            return self.base.blocks(stored)
        return self._narrow(spec, self._merged(spec, stored))

    def rows(self, name: str) -> RowStream:
        """The merged tensor's rows in float32, as nothing has rounded them yet."""
        return self._merged(self.specs[name], name if name in self.base.specs else INPUT)

    def _merged(self, spec: TensorSpec, stored: str) -> RowStream:
        def base_rows() -> Iterator[torch.Tensor]:
            return (block.to(self.device).float() for block in self.base.blocks(stored))

        rows: RowStream = base_rows
        if self.onto is not None and is_block_matrix(spec):
            rows = through_nf4(rows, spec.shape, self.onto)
        for change in self.plan.changes.get(spec.name, []):
            rows = change.apply(rows)
        return rows

    def _narrow(self, spec: TensorSpec, rows: RowStream) -> Iterator[torch.Tensor]:
        dtype = DTYPES[spec.dtype]
        limit = torch.finfo(dtype).max
        for block in rows():
            low, high = torch.aminmax(block)
            if not (low >= -limit and high <= limit):  # so that what is no number is refused too
                raise ModelError(
                    f"{spec.name} does not fit in the base's {spec.dtype} once the adapter is merged; the adapter is "
                    "not of this base, or its training diverged."
                )
            yield block.to(dtype)
