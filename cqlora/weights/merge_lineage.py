"""Whether an adapter belongs to a base, how it was trained, and what a merged model says of itself."""

from dataclasses import dataclass
from typing import Any

import torch

from cqlora.base import CARD, Base, fingerprint_tokenizer, fingerprint_weights, read_card, read_token_ids
from cqlora.config.choices import AdapterMethod, MergeOnto, Precision, Quantization
from cqlora.data.templates import FORM_KEYS, ChatForm, form_of_card
from cqlora.errors import ModelError
from cqlora.lineage import check_fingerprints
from cqlora.system.documents import shorten, take
from cqlora.weights.merge_adapter import Adapter
from cqlora.weights.nf4 import Nf4Format

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MERGED = "merged"
"""Key of a merged model's card: the base it came from, the adapters that went in, in order, and onto what."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """How the adapters of one merge are related."""

    notes: list[str]
    """What could not be checked, or is worth knowing, a sentence each."""
    apart: list[bool]
    """For each adapter, whether it was trained on the base itself though others are merged before it."""


def check_lineage(base: Base, adapters: list[Adapter], averaged: bool = False, weight: float = 1.0) -> Lineage:
    """Refuse an adapter that was trained on something else, or that another one holds already.

    Each adapter belongs to the base, or to what the base becomes with the adapters before it; those that are to be
    `averaged` all belong to the base, and may hold the same past, of which their mean holds one.

    Raises:
        ModelError: an adapter of another base or tokenizer, or two of which one was continued from the other.
    """
    if not averaged:
        refuse_held_twice(adapters)
    tokenizer, weights = fingerprint_tokenizer(base.path), fingerprint_weights(base.path)
    history, notes, apart = history_of(base), [], []
    for place, adapter in enumerate(adapters):
        described = "base_sha256" in adapter.card
        if not described:
            check_foreign_tokenizer(adapter, base)
            notes.append(f"{adapter.folder} does not say which base it was trained on; its shapes fit {base.path}.")
        follows = place > 0 and not averaged and adapter.card.get("base_merged") == history
        check_fingerprints(adapter.described, tokenizer, adapter.card["base_sha256"] if follows else weights)
        apart.append(place > 0 and described and not follows and not averaged)
        history = add_to_history(history, [adapter], MergeOnto["16bit"], weight)
    if any(apart):
        notes.append("adapters that were trained apart on one base: what each adds is added up.")
    return Lineage(notes, apart)


def refuse_held_twice(adapters: list[Adapter]) -> None:
    """Raise ModelError where an adapter was continued from another one that is to be merged too, or both from a third.

    A continued adapter holds what it began from: merging both would add that twice.
    """
    held = [{adapter.fingerprint(), *continued_from(adapter)} for adapter in adapters]
    for place, adapter in enumerate(adapters):
        for other_place, other in enumerate(adapters[:place]):
            if not held[place] & held[other_place]:
                continue
            for whole, part, pasts in ((adapter, other, held[place]), (other, adapter, held[other_place])):
                if part.fingerprint() in pasts:
                    raise ModelError(
                        f"adapter={whole.folder} was continued from {part.folder} and holds it already, so both would "
                        f"add it twice; use adapter={whole.folder}."
                    )
            raise ModelError(
                f"{other.folder} and {adapter.folder} were continued from one adapter, which would be added twice; "
                f"use adapter={other.folder} or adapter={adapter.folder}."
            )


def continued_from(adapter: Adapter) -> list[str]:
    """sha256 of each adapter that this one was continued from, the oldest first, as its card says."""
    file = adapter.folder / CARD
    entries = take(adapter.card, "lineage", file, list, default=[])
    return [take(entry if isinstance(entry, dict) else {}, "adapter_sha256", file, str) for entry in entries]


def history_of(base: Base) -> dict[str, Any]:
    """What a base was merged from; a base that was not is the beginning of its own history."""
    found: dict[str, Any] = take(read_card(base.path), MERGED, base.path / CARD, dict, default={})
    take(found, "adapters", base.path / CARD, list, default=[])
    return found if "adapters" in found else {"base_sha256": fingerprint_weights(base.path), "adapters": []}


def add_to_history(
    history: dict[str, Any], adapters: list[Adapter], onto: MergeOnto, weight: float = 1.0
) -> dict[str, Any]:
    """The history once an adapter, or the mean of several, has been merged."""
    prints = [adapter.fingerprint() for adapter in adapters]
    entry: dict[str, Any] = {"sha256": prints[0]} if len(prints) == 1 else {"average_of": prints}
    entry |= {"onto": onto.value} | ({} if weight == 1 else {"weight": weight})
    return {**history, "adapters": [*history["adapters"], entry]}


def check_foreign_tokenizer(adapter: Adapter, base: Base) -> None:
    """Raise ModelError where a tokenizer saved with the adapter gives a token another id than the base's does."""
    file = adapter.folder / "tokenizer.json"
    if not file.is_file():
        return
    theirs, ours = read_token_ids(file), read_token_ids(base.tokenizer_file)
    for token, token_id in theirs.items():
        if ours.get(token, token_id) != token_id or token_id >= base.vocab_size:
            raise ModelError(
                f"adapter={adapter.folder} has a tokenizer in which {token!r} is {token_id}, and {base.path} has "
                f"{ours.get(token, 'no such token')}; give the base that it was trained on."
            )


def tuned_form(adapters: list[Adapter]) -> ChatForm | None:
    """How the last instruction-tuned adapter writes conversations; None: none is."""
    tuned = [adapter for adapter in adapters if adapter.card.get("trained_on", {}).get("stage") == "sft"]
    return form_of_card(tuned[-1].card, tuned[-1].folder / CARD) if tuned else None


def merged_card(
    base: Base, adapters: list[Adapter], onto: MergeOnto, averaged: bool = False, weight: float = 1.0
) -> dict[str, Any]:
    """The card of the merged model, without the fingerprint of weights that are yet to be written.

    What the base's card says of its rows stays true: a merge adds and removes none.
    """
    card = {key: value for key, value in read_card(base.path).items() if key not in ("weights_sha256", "companions")}
    history = history_of(base)
    for step in [adapters] if averaged else [[adapter] for adapter in adapters]:
        history = add_to_history(history, step, onto, weight)
    form = tuned_form(adapters)
    if form is not None:
        card = {key: value for key, value in card.items() if key not in FORM_KEYS}
        card |= {"system_prompt": form.system_prompt} | form.describe()
    return card | {
        "base": base.path.name,
        "tokenizer_sha256": fingerprint_tokenizer(base.path),
        MERGED: history,
        "merged_from": [str(adapter.folder) for adapter in adapters],
    }


def read_training(adapter: Adapter, double_quantization: bool, precision: Precision) -> tuple[Quantization, Nf4Format]:
    """How the base was held while the adapter was trained: as its card says, else NF4 as the caller says.

    Raises:
        ModelError: PiSSA, which trains beside what it leaves of the base and not beside the base.
    """
    file = adapter.folder / CARD
    trained = take(adapter.card, "trained_on", file, dict, default=None)
    if trained is None:
        dtype = torch.float32 if precision is Precision.auto else getattr(torch, precision.value)
        return Quantization.nf4, Nf4Format(double_quantization, dtype)
    if trained.get("method") == AdapterMethod.pissa.value:
        raise ModelError(
            f"adapter={adapter.folder} was trained by PiSSA, beside a part of the base that is kept nowhere; merge it "
            "with onto=16bit and without measure."
        )
    quantization, dtype = (take(trained, key, file, str) for key in ("quantization", "dtype"))
    if quantization not in Quantization.__members__ or dtype not in _DTYPES:
        raise ModelError(f"{file} says quantization={shorten(quantization)}, dtype={shorten(dtype)}; restore the file.")
    return Quantization[quantization], Nf4Format(take(trained, "double_quantization", file, bool), _DTYPES[dtype])
