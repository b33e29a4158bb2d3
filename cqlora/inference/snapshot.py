"""A model's weights as the decoder computes with them, in one file that is mapped and not read.

The first load of a model with `cache=true` writes it; from the second load on nothing is quantised, merged or
put in another order, and a digest tells whether all is as it was written. It lies in the user's cache
(XDG_CACHE_HOME), under a name that depends on everything that its contents depend on, so a changed model never finds
another's.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cqlora.errors import ModelError
from cqlora.inference.decoder import Layer, Weights
from cqlora.inference.linear import Dense, restore_linear, tensors_of
from cqlora.system.durable import remove_leftovers, staged_file
from cqlora.system.machine import cache_folder
from cqlora.system.sealed import hash_document
from cqlora.system.shards import TensorSpec, dtype_name, write_shard

_VERSION = 6
_DIGEST = "digest/sha256"
_NORMS = ("attention_norm", "feed_forward_norm", "head_norms")
_LINEARS = ("query_key_value", "attention_output", "gate_up", "down")


def snapshot_file(identity: dict[str, str]) -> Path:
    """Where the snapshot of what `identity` names lies, whether or not it is there."""
    return cache_folder("engine") / f"{hash_document({'version': _VERSION, **identity})[:32]}.safetensors"


def write_snapshot(weights: Weights, file: Path) -> None:
    """Write the weights, whole or not at all.

    Raises:
        DiskError: the disk refused.
    """
    tensors = dict(_flatten(weights))
    tensors[_DIGEST] = digest(tensors)
    specs = [TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    with staged_file(file, sum(spec.nbytes for spec in specs)) as staged:
        # Also other models' files, which nobody may ask for again.
        remove_leftovers(file.parent)
        write_shard(staged, specs, lambda spec: [tensors[spec.name]])


def map_snapshot(file: Path) -> Weights:
    """The weights of a snapshot, mapped; all of it is read once, to compare it with its digest.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"the snapshot {file} is damaged ({error}); delete it and start again.") from error
    stated = tensors.pop(_DIGEST, None)
    if stated is None or not torch.equal(stated, digest(tensors)):
        raise ModelError(f"the snapshot {file} is damaged (it is not as it was written); delete it and start again.")
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, part = name.partition("/")
        groups.setdefault(owner, {})[part] = tensor
    layers = [_restore_layer(groups, n) for n in range(sum(owner.endswith(".down") for owner in groups))]
    embedding = groups["embedding"]["weight"]
    head = groups["head"]["weight"] if "head" in groups else embedding
    return Weights(embedding, layers, groups["norm"]["weight"], Dense(head))


def digest(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """uint8 (32,): sha256 of the tensors' names, types, shapes and bytes, in the order of their names."""

    def one(name: str) -> bytes:
        tensor = tensors[name]
        digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.digest()

    with ThreadPoolExecutor() as threads:
        every = b"".join(threads.map(one, sorted(tensors)))
    return torch.tensor(list(hashlib.sha256(every).digest()), dtype=torch.uint8)


def _restore_layer(groups: dict[str, dict[str, torch.Tensor]], number: int) -> Layer:
    linears = {name: restore_linear(groups[f"{number}.{name}"]) for name in _LINEARS}
    norms = {name: groups.get(f"{number}.{name}", {}).get("weight") for name in _NORMS}
    return Layer(**norms, **linears)  # type: ignore[arg-type]


def _flatten(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    yield "embedding/weight", weights.embedding
    yield "norm/weight", weights.norm
    head = tensors_of(weights.head)["weight"]
    if head is not weights.embedding:
        yield "head/weight", head
    for number, layer in enumerate(weights.layers):
        for norm in _NORMS:
            if getattr(layer, norm) is not None:
                yield f"{number}.{norm}/weight", getattr(layer, norm)
        for linear in _LINEARS:
            for part, tensor in tensors_of(getattr(layer, linear)).items():
                yield f"{number}.{linear}/{part}", tensor
