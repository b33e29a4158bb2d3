"""The difference of two models added to a third (Chat Vector, 2310.04799), as changes to its matrices."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cqlora.base import Base, fingerprint_weights, read_base, read_card, read_token_ids
from cqlora.config.differences import DifferenceConfig
from cqlora.data.templates import FORM_KEYS, read_own_template
from cqlora.errors import ModelError
from cqlora.positions import read_rope
from cqlora.system.documents import read_object, read_object_if_there, shorten
from cqlora.system.model_config import DERIVED, INPUT, OUTPUT
from cqlora.system.shards import ShardReader
from cqlora.weights.merge_changes import Change, RowFeed, RowStream

_SAME = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
)  # fmt: skip
"""Keys of config.json that must agree, beside how positions are turned; most decide shapes, all decide numbers."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`weight` · (`model`'s tensor − `minus`'s), added to the first `rows` rows of a matrix.

    Summed in float64 with what each addition rounds off, so that minus + (model − minus) is model to the last bit.
    """

    model: ShardReader
    minus: ShardReader
    name: str
    weight: float
    rows: int

    def fits(self, shape: tuple[int, ...]) -> bool:
        """See Change."""
        shapes = [reader.specs[self.name].shape for reader in (self.model, self.minus)]
        return all(each[1:] == shape[1:] and self.rows <= each[0] for each in shapes) and self.rows <= shape[0]

    def apply(self, rows: RowStream) -> RowStream:
        """See Change."""
        return lambda: self._add(rows())

    def equals(self, other: Change) -> bool:
        """See Change."""
        return self == other

    def _add(self, blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        model, minus = (RowFeed(reader.blocks(self.name)) for reader in (self.model, self.minus))
        left = self.rows
        for block in blocks:
            count = min(left, len(block))
            if count:
                block[:count] = add_difference(block[:count], model.take(count), minus.take(count), self.weight)
            left -= count
            yield block


def add_difference(base: torch.Tensor, model: torch.Tensor, minus: torch.Tensor, weight: float) -> torch.Tensor:
    """base + weight · (model − minus) in float32, both sums by TwoSum (Knuth, TAOCP 2, section 4.2.2)."""
    difference, lost_of_difference = _two_sum(model.double(), -minus.double())
    total, lost_of_total = _two_sum(base.double(), weight * difference)
    return (total + (lost_of_total + weight * lost_of_difference)).float()


def _two_sum(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rounded sum, and exactly what rounding took from it."""
    total = left + right
    of_right = total - left
    return total, (left - (total - of_right)) + (right - of_right)


@dataclass(frozen=True, slots=True)
class ModelPair:
    """Two models of the base's kind whose difference is to be added, checked against it."""

    model: Base
    minus: Base
    weight: float
    rows: int
    """Rows of the embedding matrices that belong to the same tokens in all three."""

    def changes(self, of_output: bool) -> Iterator[tuple[str, Difference]]:
        """The change of each tensor; `of_output`: the base's output matrix is one of its own, or becomes one."""
        readers = ShardReader(self.model.path), ShardReader(self.minus.path)
        for name, spec in readers[0].specs.items():
            if name == OUTPUT and self.model.tied:
                continue
            rows = self.rows if name in (INPUT, OUTPUT) else spec.shape[0]
            change = Difference(*readers, name, self.weight, rows)
            if not name.endswith(DERIVED):
                yield name, change
            if name == INPUT and self.model.tied and of_output:
                yield OUTPUT, change

    def describe(self) -> dict[str, Any]:
        """What the merged model's card says of it."""
        model, minus = (fingerprint_weights(each.path) for each in (self.model, self.minus))
        return {"model_sha256": model, "minus_sha256": minus, "weight": self.weight}


def open_pair(difference: DifferenceConfig, base: Base, base_tied: bool) -> ModelPair:
    """Read two models and refuse them where they are not of the base's architecture, tying and tokens.

    Raises:
        ModelError: see above, or a folder that holds no model.
    """
    pair = [read_base(Path(folder)) for folder in (difference.model, difference.minus)]
    own_rows = base.vocab_size if base.first_added_row is None else base.first_added_row
    rows = min(own_rows, *(each.vocab_size for each in pair))
    for each in pair:
        check_same_kind(each, base, base_tied)
        check_same_tokens(each, base, rows)
        check_same_shapes(each, base)
    return ModelPair(pair[0], pair[1], difference.weight, rows)


def check_same_kind(other: Base, base: Base, base_tied: bool) -> None:
    """Raise ModelError where two models compute differently, so that the weights of one mean nothing to the other."""
    if "quantization_config" in other.config:
        raise ModelError(f"add= names {other.path}, which is quantised; give the 16-bit model that it was made from.")
    mine, its = (describe_kind(each.config) for each in (base, other))
    for key in mine:
        if mine[key] != its[key]:
            raise ModelError(
                f"add= names {other.path}, whose {key} is {shorten(its[key])} where {base.path} has "
                f"{shorten(mine[key])}; a difference can only be added to a model of the same architecture."
            )
    if other.tied != base_tied:
        states = {True: "one matrix", False: "two matrices"}
        raise ModelError(
            f"add= names {other.path}, whose embeddings are {states[other.tied]} where those of {base.path} are "
            f"{states[base_tied]}; give models that tie them alike."
        )


def describe_kind(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config.json decides how weights are used, with transformers' defaults filled in."""
    heads = config["num_attention_heads"]
    defaults = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads, "hidden_act": "silu"}
    defaults["rms_norm_eps"] = 1e-6
    kind = {key: defaults.get(key) if config.get(key) is None else config[key] for key in _SAME}
    return kind | {"rope": read_rope(config)}


def check_same_tokens(other: Base, base: Base, rows: int) -> None:
    """Raise ModelError where one of the first `rows` rows belongs to another token in the other model."""
    mine, its = (
        {token_id: token for token, token_id in read_token_ids(each.tokenizer_file).items()} for each in (base, other)
    )
    for token_id, token in mine.items():
        if token_id < rows and its.get(token_id, token) != token:
            raise ModelError(
                f"add= names {other.path}, where token {token_id} is {its[token_id]!r} and in {base.path} {token!r}; "
                "give models with the tokenizer that the base was extended from."
            )


def check_same_shapes(other: Base, base: Base) -> None:
    """Raise ModelError where the other model lacks a tensor of the base or has one of another shape or more."""
    mine, its = (
        {
            name: spec.shape[1:] if name in (INPUT, OUTPUT) else spec.shape
            for name, spec in ShardReader(each.path).specs.items()
            if not name.endswith(DERIVED) and not (name == OUTPUT and each.tied)
        }
        for each in (base, other)
    )
    for name in sorted(mine.keys() | its.keys()):
        if mine.get(name) != its.get(name):
            raise ModelError(
                f"add= names {other.path}, whose {name} does not match that of {base.path}; a difference can only be "
                "added to a model of the same shapes."
            )


def spoken_template(pairs: list[ModelPair], base: Base) -> tuple[str, ModelPair] | None:
    """The chat template that goes along with differences: that of the model with the largest weight above zero which
    has one whose control tokens the base knows under the same ids."""
    known = read_token_ids(base.tokenizer_file)
    for pair in sorted(pairs, key=lambda pair: -pair.weight):
        template = read_own_template(pair.model.path)
        if pair.weight > 0 and template and all(known.get(t) == i for t, i in _control_tokens(pair.model, template)):
            return template, pair
    return None


def _control_tokens(model: Base, template: str) -> Iterator[tuple[str, int]]:
    """The control tokens that a template writes, with their ids."""
    for token in read_object(model.tokenizer_file).get("added_tokens", []):
        if token["special"] and token["content"] in template:
            yield token["content"], token["id"]


def spoken_ends(pair: ModelPair) -> list[int]:
    """Ids that end a reply of the pair's model."""
    ends = read_object_if_there(pair.model.path / "generation_config.json").get(
        "eos_token_id", pair.model.config["eos_token_id"]
    )
    return [ends] if isinstance(ends, int) else list(ends or [])


def spoken_form(pair: ModelPair) -> dict[str, Any]:
    """What the card of the pair's model says of how it is asked."""
    return {key: value for key, value in read_card(pair.model.path).items() if key in FORM_KEYS}
