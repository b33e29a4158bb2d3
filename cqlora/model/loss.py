"""Cross entropy of next tokens, with logits only where there is a label and never more than a chunk of them.

The logits of a long pack are by far the largest tensor of a training step (1,024 positions of a 49,152-token
vocabulary are 192 MiB in float32, and the stock loss holds four of them). Here they exist `chunk_tokens` rows
at a time in one buffer: the forward pass turns each chunk into probabilities minus one-hot labels, in place,
and adds what follows from them to the gradients, so that the backward pass has only to scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cqlora.errors import ModelError

CHUNK_TOKENS = {"cpu": 256, "cuda": 512}
"""Label positions whose logits exist at once, by device.

A chunk of c positions is 2 c V D operations on 2 V D bytes of a 16-bit head: c operations a byte. While it reads a
byte an A100 has time for 156, a 4090 for 164, an H100 for 295 (published throughput over bandwidth), so 512 positions
keep each of them busy and 256 not the last.

Measured on a CPU with a vocabulary of 49,152 and a hidden size of 576, forward and gradient together, per
label token: 64 at once 1.07 ms (12 MiB of logits), 128 0.93, 256 0.79 (48 MiB), 512 0.74, 1,024 0.72
(192 MiB). Beyond 256 memory doubles for less than a tenth of the loss's own time.
"""


@dataclass(frozen=True, slots=True)
class OutputHead:
    """What turns hidden states into logits: a matrix, some of its rows replaced, a low-rank product added.

    Every tensor may require a gradient or not. Build it where it is used, once per forward pass: it holds
    references to the module's parameters and the module's present state (active adapter, training or not).
    """

    weight: Tensor
    """(V, D)."""
    rows: Tensor | None = None
    """(R, D), used in place of `weight[row_indices]`."""
    row_indices: Tensor | None = None
    """(R,) int64 on the CPU, each token once. Every run of neighbours is a matrix product of its own."""
    lora_a: Tensor | None = None
    """(r, D)."""
    lora_b: Tensor | None = None
    """(V, r)."""
    lora_scale: float = 1.0
    lora_dropout: float = 0.0
    dtype: torch.dtype | None = None
    """What the products compute in outside autocast; None is the type of `weight`."""

    @classmethod
    def from_module(cls, lm_head: nn.Module) -> Self:
        """Read a head off `nn.Linear` or what PEFT wraps around it: LoRA, trainable tokens, a saved copy.

        The tensors are the module's own parameters, so gradients land where PEFT saves from. Trainable tokens
        of a head that is tied to the input embedding are the embedding's.

        Raises:
            ModelError: the head has a bias, is quantised, or carries an adapter that is not a plain product.
        """
        if isinstance(lm_head, ModulesToSaveWrapper):
            return cls.from_module(_saved_module(lm_head))
        if isinstance(lm_head, TrainableTokensWrapper):
            return cls.from_module(lm_head.token_adapter)
        if not isinstance(lm_head, LoraLayer | TrainableTokensLayer):
            return cls(weight=_plain_weight(lm_head))
        weight = _plain_weight(lm_head.base_layer)
        adapter = _active_adapter(lm_head)
        if adapter is None:
            return cls(weight=weight)
        if isinstance(lm_head, TrainableTokensLayer):
            indices = torch.tensor(lm_head.token_indices[adapter], dtype=torch.int64)
            return cls(weight=weight, rows=lm_head.trainable_tokens_delta[adapter], row_indices=indices)
        if lm_head.lora_variant or lm_head.lora_bias[adapter]:
            raise ModelError("lm_head carries DoRA or a LoRA bias; take lm_head out of lora.target_modules.")
        dropout = lm_head.lora_dropout[adapter]
        return cls(
            weight=weight,
            lora_a=lm_head.lora_A[adapter].weight,
            lora_b=lm_head.lora_B[adapter].weight,
            lora_scale=lm_head.scaling[adapter],
            lora_dropout=dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        )


def label_cross_entropy(
    hidden: Tensor,
    positions: Tensor,
    targets: Tensor,
    head: OutputHead,
    divisor: Tensor | float,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the label tokens' cross entropies over `divisor`.

    A token is predicted from the hidden state before it. No label at all gives a loss of 0 with gradients of 0.

    Args:
        hidden: (B, T, D) or (B * T, D), what the head is applied to.
        positions: (L,) int64, where among the B * T the predicted tokens stand, ascending; none is the first of a
            row or of a document.
        targets: (L,) int64, the ids of those tokens.
        head: the output projection; see `OutputHead.from_module`.
        divisor: label tokens of the whole global batch, so that gradients add up to its mean.
        chunk_tokens: label positions whose logits exist at once; None is `CHUNK_TOKENS` of the device.

    Returns:
        The loss, a float32 scalar to call backward on (once: its gradients are scaled in place); and the token
        losses (L,) in float32, detached.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunk_tokens = chunk_tokens or CHUNK_TOKENS.get(hidden.device.type, 256)
    if torch.is_grad_enabled():
        tensors = (head.weight, head.rows, head.lora_a, head.lora_b)
        total, losses = _LabelCrossEntropy.apply(  # type: ignore[no-untyped-call]
            flat, *tensors, head, positions - 1, targets, chunk_tokens
        )
    else:
        losses = _sweep(flat, head, positions - 1, targets, chunk_tokens, _Gradients())
        total = losses.sum()
    return (total / divisor if len(positions) else total), losses


def likeliest_tokens(hidden: Tensor, positions: Tensor, head: OutputHead) -> Tensor:
    """(L,) int64: the token with the largest logit where each label stands; arguments as label_cross_entropy's.

    All L rows of logits exist at once.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    dtype, logits = _open_logits(len(positions), head, flat.device)
    with torch.autocast(flat.device.type, enabled=False):
        states = flat.index_select(0, positions - 1).to(dtype)
        logits.project(states, _split_blocks(head, _Gradients(), dtype), _HeadAdapter(head, states))
    return logits.exact.argmax(1)


@dataclass(slots=True)
class _Gradients:
    """Float32 sums over the chunks, None where no gradient is wanted, in the order of autograd's inputs."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    rows: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor | None]:
        return (getattr(self, field.name) for field in fields(self))

    @property
    def wanted(self) -> bool:
        return any(gradient is not None for gradient in self)


class _LabelCrossEntropy(torch.autograd.Function):
    """Sum of token losses; the gradients are made in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        head: OutputHead,
        sources: Tensor,
        targets: Tensor,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        inputs = (hidden, weight, rows, lora_a, lora_b)
        gradients = _Gradients(
            *(
                torch.zeros_like(tensor, dtype=torch.float32) if needed and tensor is not None else None
                for tensor, needed in zip(inputs, ctx.needs_input_grad[:5], strict=True)
            )
        )
        losses = _sweep(hidden, head, sources, targets, chunk_tokens, gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        # In float32 and only then cast: 1 / divisor in bfloat16 would be off by up to 0.4% in every gradient.
        scaled = (
            None if gradient is None else gradient.mul_(grad_total).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None


def _sweep(
    hidden: Tensor,
    head: OutputHead,
    sources: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    gradients: _Gradients,
) -> Tensor:
    """Token losses (L,) of `targets` given the hidden states at `sources`; adds to `gradients` on the way."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    dtype, buffer = _open_logits(min(chunk_tokens, len(targets)), head, hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        blocks = _split_blocks(head, gradients, dtype)
        for begin in range(0, len(targets), chunk_tokens):
            chunk = slice(begin, begin + chunk_tokens)
            states = hidden.index_select(0, sources[chunk]).to(dtype)
            adapter = _HeadAdapter(head, states)
            logits = buffer.first(len(states))
            logits.project(states, blocks, adapter)
            losses[chunk] = logits.subtract_labels(targets[chunk])
            if gradients.wanted:
                grad_states = logits.backproject(states, blocks, adapter, gradients)
                if gradients.hidden is not None:
                    gradients.hidden.index_copy_(0, sources[chunk], grad_states)
    return losses


def _open_logits(rows: int, head: OutputHead, device: torch.device) -> tuple[torch.dtype, "_Logits"]:
    """What matrix products compute in here, and a buffer for the logits of `rows` positions."""
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else head.dtype or head.weight.dtype
    exact = torch.empty((rows, len(head.weight)), dtype=torch.float32, device=device)
    return dtype, _Logits(exact, None if dtype is torch.float32 else torch.empty_like(exact, dtype=dtype))


@dataclass(frozen=True, slots=True)
class _Block:
    """A range of the vocabulary, the rows that give its logits, and their gradient's sum (columns, D)."""

    columns: slice
    matrix: Tensor
    gradient: Tensor | None


def _split_blocks(head: OutputHead, gradients: _Gradients, dtype: torch.dtype) -> list[_Block]:
    """Cut the vocabulary where `head.rows` takes over from `head.weight`, without copying either."""
    blocks: list[_Block] = []

    def cut(columns: slice, matrix: Tensor, rows: slice, gradient: Tensor | None) -> None:
        if columns.start < columns.stop:
            total = None if gradient is None else gradient[rows]
            blocks.append(_Block(columns, matrix[rows].to(dtype), total))

    end = 0
    for begin, rows in _find_runs(head.row_indices):
        assert head.rows is not None, "row_indices without rows"
        kept, replaced = slice(end, begin), slice(begin, begin + rows.stop - rows.start)
        cut(kept, head.weight, kept, gradients.weight)
        cut(replaced, head.rows, rows, gradients.rows)
        end = replaced.stop
    last = slice(end, len(head.weight))
    cut(last, head.weight, last, gradients.weight)
    return blocks


def _find_runs(indices: Tensor | None) -> list[tuple[int, slice]]:
    """Runs of neighbouring tokens: the first token of each, and the rows that hold it, in order of tokens."""
    if indices is None:
        return []
    breaks = (indices.diff() != 1).nonzero().squeeze(1).add_(1).tolist()
    begins, ends = [0, *breaks], [*breaks, len(indices)]
    return sorted(
        ((int(indices[begin]), slice(begin, end)) for begin, end in zip(begins, ends, strict=True)),
        key=lambda run: run[0],
    )


class _HeadAdapter:
    """The adapter of the head on one chunk, in the adapter's own type: scale * dropout(states) A^T B^T."""

    def __init__(self, head: OutputHead, states: Tensor) -> None:
        self.a, self.b, self.scale = head.lora_a, head.lora_b, head.lora_scale
        self.keep: Tensor | None = None
        if self.a is None or self.b is None:
            return
        self.states = states.to(self.a.dtype)
        if head.lora_dropout > 0:
            self.keep = F.dropout(torch.ones_like(self.states), head.lora_dropout)
            self.states = self.states * self.keep
        self.inner = self.states @ self.a.T

    def add_logits(self, logits: Tensor) -> None:
        if self.b is not None:
            _add_product(logits, self.inner * self.scale, self.b.T)

    def add_gradients(self, slopes: Tensor, grad_states: Tensor, gradients: _Gradients) -> None:
        """Add what the logits' gradient (c, V) makes of `grad_states` (c, D) and the adapter's sums."""
        if self.a is None or self.b is None:
            return
        slopes = slopes.to(self.b.dtype)
        grad_inner = (slopes @ self.b) * self.scale
        grad_adapted = grad_inner @ self.a
        grad_states.add_(grad_adapted if self.keep is None else grad_adapted * self.keep)
        if gradients.lora_a is not None:
            _add_product(gradients.lora_a, grad_inner.T, self.states)
        if gradients.lora_b is not None:
            _add_product(gradients.lora_b, slopes.T, self.inner * self.scale)


@dataclass(frozen=True, slots=True)
class _Logits:
    """One chunk's logits (c, V), then their gradient: in float32, and in the type of the matrix products."""

    exact: Tensor
    rounded: Tensor | None
    """None where matrix products are float32."""

    def first(self, rows: int) -> "_Logits":
        """The first rows of it."""
        return _Logits(self.exact[:rows], None if self.rounded is None else self.rounded[:rows])

    def project(self, states: Tensor, blocks: list[_Block], adapter: _HeadAdapter) -> None:
        """Fill in the logits of `states` (c, D)."""
        product = self.exact if self.rounded is None else self.rounded
        for block in blocks:
            torch.mm(states, block.matrix.T, out=product[:, block.columns])
        if self.rounded is not None:
            self.exact.copy_(self.rounded)
        adapter.add_logits(self.exact)

    def subtract_labels(self, targets: Tensor) -> Tensor:
        """Turn logits into probabilities minus one-hot targets, in place; return the token losses (c,)."""
        index = targets.unsqueeze(1)
        of_target = self.exact.gather(1, index)
        peak = self.exact.amax(1, keepdim=True)
        total = self.exact.sub_(peak).exp_().sum(1, keepdim=True)
        self.exact.div_(total).scatter_add_(1, index, torch.full_like(of_target, -1.0))
        return (total.log() + peak - of_target).squeeze(1)

    def backproject(self, states: Tensor, blocks: list[_Block], adapter: _HeadAdapter, gradients: _Gradients) -> Tensor:
        """Add to the matrices' `gradients`; return the gradient (c, D) of `states` in float32."""
        grad_states = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
        adapter.add_gradients(self.exact, grad_states, gradients)
        factor = self.exact if self.rounded is None else self.rounded.copy_(self.exact)
        for block in blocks:
            slopes = factor[:, block.columns]
            if gradients.hidden is not None:
                _add_product(grad_states, slopes, block.matrix)
            if block.gradient is not None:
                _add_product(block.gradient, slopes.T, states)
        return grad_states


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, with `total` in float32 whatever the factors are."""
    if left.dtype is total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _active_adapter(layer: Any) -> str | None:
    """Name of the adapter that acts on a PEFT layer; None where it is off or merged into the base.

    Raises:
        ModelError: several adapters act at once.
    """
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    held = layer.token_indices if isinstance(layer, TrainableTokensLayer) else layer.lora_A
    active = [name for name in layer.active_adapters if name in held]
    if layer.disable_adapters or layer.merged or not active:
        return None
    if len(active) > 1:
        raise ModelError(f"adapters {active} all act on lm_head; set one of them with set_adapter.")
    return str(active[0])


def _saved_module(wrapper: Any) -> nn.Module:
    """The copy that PEFT trains in full, or the original where that is off."""
    active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    module: nn.Module = wrapper.original_module
    if active and not wrapper.disable_adapters:
        module = wrapper.modules_to_save[active[0]]
    return module


def _plain_weight(linear: nn.Module) -> Tensor:
    """The matrix of an unquantised linear layer without bias.

    Raises:
        ModelError: it is anything else.
    """
    weight = getattr(linear, "weight", None)
    if not isinstance(linear, nn.Linear) or weight is None or not weight.is_floating_point():
        raise ModelError(f"lm_head is a {type(linear).__name__}; keep it out of quantisation, as nn.Linear.")
    if linear.bias is not None:
        raise ModelError("lm_head has a bias, which LLaMA's has not; use a model without one.")
    return weight
