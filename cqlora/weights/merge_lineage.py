"""Whether an adapter belongs to a base, how it was trained, and what a merged model says of itself."""

import json
from pathlib import Path
from typing import Any

import torch

from cqlora.base import Base, fingerprint_tokenizer, fingerprint_weights, read_card
from cqlora.choices import AdapterMethod, MergeOnto, Precision, Quantization
from cqlora.errors import ModelError
from cqlora.preflight import check_fingerprints
from cqlora.weights.merge_adapter import Adapter
from cqlora.weights.nf4 import Nf4Format

MERGED = "merged"
"""Key of a merged model's card: the base it came from, the adapters that went in, in order, and onto what."""


def check_lineage(base: Base, adapters: list[Adapter]) -> list[str]:
    """Refuse an adapter that was trained on something else; return what could not be checked, a sentence each.

    Each adapter belongs to the base, or to what the base becomes with the adapters before it.

    Raises:
        ModelError: an adapter of another base or tokenizer.
    """
    tokenizer, weights = fingerprint_tokenizer(base.path), fingerprint_weights(base.path)
    history = history_of(base)
    notes = []
    for place, adapter in enumerate(adapters):
        if "base_sha256" not in adapter.card:
            check_foreign_tokenizer(adapter, base)
            notes.append(f"{adapter.folder} does not say which base it was trained on; its shapes fit {base.path}.")
        follows = place > 0 and adapter.card.get("base_merged") == history
        check_fingerprints(adapter.folder, tokenizer, adapter.card["base_sha256"] if follows else weights)
        history = add_to_history(history, adapter, MergeOnto["16bit"])
    return notes


def history_of(base: Base) -> dict[str, Any]:
    """What a base was merged from; a base that was not is the beginning of its own history."""
    found: dict[str, Any] | None = read_card(base.path).get(MERGED)
    return found or {"base_sha256": fingerprint_weights(base.path), "adapters": []}


def add_to_history(history: dict[str, Any], adapter: Adapter, onto: MergeOnto) -> dict[str, Any]:
    """The history once an adapter has been merged."""
    return {**history, "adapters": [*history["adapters"], {"sha256": adapter.fingerprint(), "onto": onto.value}]}


def check_foreign_tokenizer(adapter: Adapter, base: Base) -> None:
    """Raise ModelError where a tokenizer saved with the adapter gives a token another id than the base's does."""
    file = adapter.folder / "tokenizer.json"
    if not file.is_file():
        return
    theirs, ours = read_ids(file), read_ids(base.tokenizer_file)
    for token, token_id in theirs.items():
        if ours.get(token, token_id) != token_id or token_id >= base.vocab_size:
            raise ModelError(
                f"adapter={adapter.folder} has a tokenizer in which {token!r} is {token_id}, and {base.path} has "
                f"{ours.get(token, 'no such token')}; give the base that it was trained on."
            )


def read_ids(tokenizer_file: Path) -> dict[str, int]:
    """Every token of a tokenizer.json and its id."""
    document = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    vocab = document["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in document.get("added_tokens") or []}


def merged_card(base: Base, adapters: list[Adapter], onto: MergeOnto) -> dict[str, Any]:
    """The card of the merged model, without the fingerprint of weights that are yet to be written.

    What the base's card says of its rows stays true: a merge adds and removes none.
    """
    card = {key: value for key, value in read_card(base.path).items() if key != "weights_sha256"}
    history = history_of(base)
    for adapter in adapters:
        history = add_to_history(history, adapter, onto)
        if adapter.card.get("trained_on", {}).get("stage") == "sft":
            card["system_prompt"] = adapter.card.get("system_prompt", "")
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
    trained = adapter.card.get("trained_on")
    if trained is None:
        dtype = torch.float32 if precision is Precision.auto else getattr(torch, precision.value)
        return Quantization.nf4, Nf4Format(double_quantization, dtype)
    if trained["method"] == AdapterMethod.pissa.value:
        raise ModelError(
            f"adapter={adapter.folder} was trained by PiSSA, beside a part of the base that is kept nowhere; merge it "
            "with onto=16bit and without measure."
        )
    form = Nf4Format(trained["double_quantization"], getattr(torch, trained["dtype"]))
    return Quantization[trained["quantization"]], form
