"""Folders to a decoder's weights: the base or merged model, the adapter's changes, the form to compute in."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cqlora.base import Base
from cqlora.errors import ModelError
from cqlora.inference.architecture import Architecture
from cqlora.inference.decoder import Layer, Weights
from cqlora.inference.form import Form, Layout
from cqlora.inference.linear import AdapterTerm, Biased, Dense, FusedNf4, Linear, pack_dense, pack_for_kernel
from cqlora.inference.nf4_parts import Nf4Parts, quantise_rows, read_parts
from cqlora.system.model_config import INPUT, OUTPUT
from cqlora.weights.merge_changes import LowRank
from cqlora.weights.merge_plan import MergedSource

NORM = "model.norm.weight"


@dataclass(frozen=True, slots=True)
class Model:
    """A model on the disk: a base with an adapter's changes, or a folder as it is."""

    base: Base
    source: MergedSource
    is_nf4: bool
    """Whether the folder's own matrices are NF4; else `source.onto` says whether they are to become so."""

    @property
    def quantised(self) -> bool:
        """Whether the blocks' matrices are those that NF4 makes of them."""
        return self.is_nf4 or self.source.onto is not None

    def dense(self, name: str) -> torch.Tensor:
        """A tensor in float32 on the source's device, an adapter's changes merged into it."""
        if self.is_nf4 and f"{name}.absmax" in self.source.base.specs:
            return read_parts(self.source.base, name).to(self.source.device).dense()
        if name not in self.source.specs:
            raise ModelError(f"{self.base.path} has no {name}, so its weights are not whole; fetch it again.")
        return torch.cat(list(self.source.rows(name)()))

    def parts(self, name: str) -> Nf4Parts:
        """A matrix of the blocks in NF4, without an adapter's changes."""
        reader, form = self.source.base, self.source.onto
        if form is None:
            return read_parts(reader, name)
        return quantise_rows(lambda: (rows.float() for rows in reader.blocks(name)), reader.specs[name].shape, form)

    def low_rank(self, name: str) -> LowRank | None:
        """What the adapter adds to a matrix of the blocks; None where it leaves it alone."""
        changes = self.source.plan.changes.get(name, [])
        return changes[0] if changes else None  # type: ignore[return-value]

    def is_low_rank(self, names: Sequence[str]) -> bool:
        """Whether the adapter at most adds products of two thin matrices to these."""
        of_each = [self.source.plan.changes.get(name, []) for name in names]
        return all(len(changes) <= 1 and all(isinstance(c, LowRank) for c in changes) for changes in of_each)


def build_weights(model: Model, architecture: Architecture, form: Form) -> Weights:
    """All weights in `form`, with the matrices joined that are multiplied by the same input."""

    def matrix(name: str) -> torch.Tensor:
        return model.dense(name).to(form.device, form.dtype)

    embedding = matrix(INPUT)
    return Weights(
        embedding=embedding,
        layers=[build_layer(model, architecture, f"model.layers.{n}.", form) for n in range(architecture.layers)],
        norm=model.dense(NORM).to(form.device, form.activations),
        head=Dense(embedding if model.source.plan.tied else matrix(OUTPUT)),
    )


def pack_weights(weights: Weights) -> Weights:
    """The weights with every bfloat16 matrix in oneDNN's own order; the layers of `weights` are used up."""
    for number, layer in enumerate(weights.layers):
        # One by one, so that no more than one of them is held twice.
        weights.layers[number] = replace(
            layer,
            query_key_value=pack_dense(layer.query_key_value),
            attention_output=pack_dense(layer.attention_output),
            gate_up=pack_dense(layer.gate_up),
            down=pack_dense(layer.down),
        )
    return Weights(weights.embedding, weights.layers, weights.norm, pack_dense(weights.head))


def build_layer(model: Model, architecture: Architecture, prefix: str, form: Form) -> Layer:
    """One block's weights; `prefix` is its name with a dot at the end."""

    def vector(name: str) -> torch.Tensor:
        return model.dense(f"{prefix}{name}").to(form.device, form.activations)

    def norm(name: str) -> torch.Tensor:
        return vector(f"{name}.weight")

    def joined(*names: str) -> Linear:
        product = build_linear(model, [f"{prefix}{name}.weight" for name in names], form)
        # Of the layers that are joined all have a bias or none has.
        if names[0].rpartition(".")[2] not in architecture.biases:
            return product
        return Biased(product, torch.cat([vector(f"{name}.bias") for name in names]))

    def head_norms() -> torch.Tensor:
        heads = {"self_attn.q_norm": architecture.heads, "self_attn.k_norm": architecture.key_value_heads}
        return torch.cat([norm(name).expand(count, -1) for name, count in heads.items()])

    return Layer(
        attention_norm=norm("input_layernorm"),
        query_key_value=joined("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        head_norms=head_norms() if architecture.head_norms else None,
        attention_output=joined("self_attn.o_proj"),
        feed_forward_norm=norm("post_attention_layernorm"),
        gate_up=joined("mlp.gate_proj", "mlp.up_proj"),
        down=joined("mlp.down_proj"),
    )


def build_linear(model: Model, names: list[str], form: Form) -> Linear:
    """Matrices of the same input as one layer."""
    if form.layout is Layout.dense or not model.is_low_rank(names):
        rows = [model.dense(name).to(form.device, form.dtype) for name in names]
        return Dense(torch.cat(rows) if len(rows) > 1 else rows[0])
    parts = [model.parts(name) for name in names]
    packed, scales = (torch.cat([getattr(part, field) for part in parts]) for field in ("packed", "scales"))
    low_rank = join_low_rank(model, names, parts, form)
    by_row = scales.view(len(packed), -1)
    return FusedNf4(pack_for_kernel(packed), by_row.T.to(torch.bfloat16).contiguous(), low_rank)


def join_low_rank(model: Model, names: list[str], parts: list[Nf4Parts], form: Form) -> AdapterTerm | None:
    """The adapter's parts of joined matrices as one: B beside zeros where the other matrices' outputs are."""
    changes = [model.low_rank(name) for name in names]
    if not any(changes):
        return None
    rows = [len(part.packed) for part in parts]
    columns = 2 * parts[0].packed.shape[1]
    ups, downs, scales = [], [], []
    for name, change, height in zip(names, changes, rows, strict=True):
        up, down = change.factors() if change else (torch.zeros(height, 0), torch.zeros(0, columns))
        ups.append(up * (change.scaling if change else 1.0))
        downs.append(down)
        scales.append(dora_scale(model, name, change) if change else None)
    row_scale = None
    if any(scale is not None for scale in scales):
        filled = [torch.ones(n) if scale is None else scale for scale, n in zip(scales, rows, strict=True)]
        row_scale = torch.cat(filled).to(form.device, form.activations)
    alike = len(ups) > 1 and len({up.shape for up in ups}) == 1
    up = torch.stack(ups).transpose(1, 2) if alike else torch.block_diag(*ups).T
    return AdapterTerm(
        down=torch.cat(downs).T.contiguous().to(form.device, form.activations),
        up=up.contiguous().to(form.device, form.activations),
        row_scale=row_scale,
    )


def dora_scale(model: Model, name: str, change: LowRank) -> torch.Tensor | None:
    """(out,): by how much DoRA rescales each row of the matrix with the product added; None for plain LoRA."""
    if change.magnitude is None:
        return None
    magnitude = change.reader.read(change.magnitude).float()
    up, down = change.factors()
    merged = torch.addmm(model.parts(name).dense(), up, down, alpha=change.scaling)
    scale: torch.Tensor = magnitude / torch.linalg.norm(merged, dim=1)
    return scale
