"""Attention that keeps the documents of a pack apart, and the choice of what computes it.

A pack is a row of documents laid end to end, `position_ids` from 0 in each. The back ends of this module run
every document on its own, so their work grows with the squares of the documents' lengths instead of the pack's
and no mask is ever built. Where the boundaries lie is worked out once per batch, on the host, and handed to
every layer through the model's keyword arguments, under transformers' own names where it has any.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_flash_attn_2_available

from cqlora.config.choices import Attention
from cqlora.errors import ModelError
from cqlora.model.transfer import send
from cqlora.system.machine import has_varlen_attention

DOCUMENTS = "cqlora_documents"
"""Name under which transformers knows `attend_by_document`, as `attn_implementation`."""

VARLEN = "cqlora_varlen"
"""Likewise of `attend_in_one_call`."""

FLASH = "cqlora_packed"
"""Likewise of `attend_by_flash`; transformers takes every name with "flash" in it for one of its own."""

_STOCK = {Attention.sdpa: "sdpa", Attention.eager: "eager"}


def name_attention(choice: Attention, device_type: str) -> str:
    """transformers' name of an attention back end that runs on `device_type` ("cuda", "cpu").

    Raises:
        ModelError: the back end cannot run here.
    """
    if choice is Attention.documents:
        return DOCUMENTS
    if choice is Attention.flash:
        reason = _why_no_flash(device_type)
        if reason is not None:
            raise ModelError(f"model.attention=flash needs {reason}; use model.attention=documents.")
        return FLASH
    if choice is Attention.varlen:
        reason = _why_no_varlen(device_type)
        if reason is not None:
            raise ModelError(f"model.attention=varlen needs {reason}; use model.attention=documents.")
        return VARLEN
    if choice is Attention.flex:
        if device_type == "cpu":
            raise ModelError("model.attention=flex has no backward pass on device cpu; use model.attention=documents.")
        return "flex_attention"
    return _STOCK[choice]


def document_kwargs(
    documents: Tensor | Sequence[int] | Sequence[Sequence[int]], device: torch.device | str
) -> dict[str, Any]:
    """Where documents begin and end, as keyword arguments of a transformers model's forward.

    Every back end that `name_attention` names accepts them; the stock ones ignore what they do not read.
    Pass `position_ids` that restart in each document too, no attention mask, and `use_cache=False`. Padding
    at the end of a row is a document of its own.

    Args:
        documents: lengths of the documents of one row, or such a list for each of B rows, all of one sum T;
            or the batch's `position_ids` (B, T), on the host: a document begins where they do not go up by 1.
        device: where the model's inputs are.

    Raises:
        ModelError: the rows' lengths do not have the same sum, or a document is empty.
    """
    rows = _read_rows(documents)
    lengths = [length for row in rows for length in row]
    if len({sum(row) for row in rows}) != 1 or min(lengths) < 1:
        raise ModelError(
            f"document lengths {rows} must be at least 1 and have the same sum in every row; pad the shorter "
            "rows with a last document."
        )
    bounds = send(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "document_lengths": lengths,
    }


def mask_kwargs(decoder: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """The mask of packed rows as a keyword argument of `decoder`, a transformers model, where it has to be handed in.

    The attention of this module reads none. Left to itself transformers looks whether position_ids restart, for which
    the host waits until a GPU has computed all that was asked of it before; a mask of four dimensions it passes on as
    it is.
    """
    config: Any = decoder.config
    if config._attn_implementation not in (DOCUMENTS, VARLEN, FLASH):
        return {}
    return {"attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)}


def attend_by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    document_lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document: a function for transformers' `ALL_ATTENTION_FUNCTIONS`.

    Without `document_lengths` every row is one document, with or without padding and cache, as in generation.

    Args:
        query: (B, H, T, d).
        key, value: (B, K, T, d), where K divides H: neighbouring query heads share one of the K.
        attention_mask: what `_document_mask` made.
        document_lengths: the B rows' documents, one row after another, from `document_kwargs`.
        sliding_window: tokens that the layer looks back over, itself included; None is all.

    Returns:
        (B, T, H, d), and no attention weights.

    Raises:
        ModelError: rows hold several documents and `document_lengths` is missing, or is of another batch; or a
            document is longer than the window.
    """
    if document_lengths is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise ModelError(
                "position_ids restart within a row but document_lengths is missing; pass "
                "**document_kwargs(position_ids, device) to the model."
            )
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    batch, heads, length, width = query.shape
    _check_lengths(document_lengths, batch, length)
    _check_window(max(document_lengths), sliding_window)
    runs = [(size, len(list(group))) for size, group in groupby(document_lengths)]
    tokens = [size * count for size, count in runs]
    # The backward pass of a split is one concatenation; slices would each fill a whole gradient with zeros.
    parts = [torch.split(_lay_end_to_end(states), tokens) for states in (query, key, value)]
    outputs = [
        _attend_within(queries, keys, values, count, dropout, scaling)
        for (_, count), queries, keys, values in zip(runs, *parts, strict=True)
    ]
    packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return packed.view(batch, length, heads, width), None


def attend_packed(
    call: Callable[..., Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    document_lengths: list[int] | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `attend_by_document`, documents of all lengths in one call of a kernel for 16 bits on a GPU.

    Rows that hold one document each, as in generation, are left to `attend_by_document`.

    Args:
        call: `_call_varlen` or `_call_flash`.
        cu_seq_lens_q: where documents begin, and the end, from `document_kwargs`.
        max_length_q: tokens of the longest document.

    Raises:
        ModelError: the rows' lengths do not fill the batch, or the kernel cannot do what the layer asks for.
    """
    if document_lengths is None or cu_seq_lens_q is None or max_length_q is None:
        return attend_by_document(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    batch, heads, length, width = query.shape
    _check_lengths(document_lengths, batch, length)
    states = map(_lay_end_to_end, (query, key, value))
    packed = call(*states, cu_seq_lens_q, max_length_q, dropout, scaling, sliding_window)
    return packed.view(batch, length, heads, width), None


def _call_varlen(
    queries: Tensor, keys: Tensor, values: Tensor, bounds: Tensor, longest: int, dropout: float, scaling: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    """torch's kernel, which has no dropout, and is given no window."""
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    _check_window(longest, window)
    if dropout:
        raise ModelError(
            f"model.attention=varlen drops nothing and the base's attention_dropout is {dropout}; use "
            "model.attention=documents."
        )
    packed: Tensor = attend(
        queries, keys, values, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0),
        enable_gqa=queries.shape[1] != keys.shape[1],
    )  # fmt: skip
    return packed


def _call_flash(
    queries: Tensor, keys: Tensor, values: Tensor, bounds: Tensor, longest: int, dropout: float, scaling: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    """flash-attn's kernel; transformers' own call of it looks at position_ids first, for which the host waits."""
    from flash_attn import flash_attn_varlen_func

    packed: Tensor = flash_attn_varlen_func(
        queries, keys, values, bounds, bounds, longest, longest, dropout_p=dropout, softmax_scale=scaling, causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )  # fmt: skip
    return packed


attend_in_one_call = partial(attend_packed, _call_varlen)
attend_by_flash = partial(attend_packed, _call_flash)


def _check_lengths(document_lengths: list[int], batch: int, length: int) -> None:
    """Raise ModelError where documents do not fill the batch."""
    if sum(document_lengths) != batch * length:
        raise ModelError(
            f"document_lengths add up to {sum(document_lengths)} where the batch has {batch} rows of "
            f"{length} tokens; build document_kwargs from this batch."
        )


def _check_window(longest: int, sliding_window: int | None) -> None:
    """Raise ModelError where a document is longer than the layer's window."""
    if sliding_window is not None and longest > sliding_window:
        raise ModelError(
            f"a document of {longest} tokens is longer than the layer's window of {sliding_window}; cut "
            f"documents with stage.sequence_length={sliding_window}."
        )


def _attend_within(
    query: Tensor, key: Tensor, value: Tensor, documents: int, dropout: float, scaling: float | None
) -> Tensor:
    """Attention of neighbouring documents of one length L, (documents * L, H or K, d), in one call."""
    query, key, value = (
        states.view(documents, -1, *states.shape[1:]).transpose(1, 2) for states in (query, key, value)
    )
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).flatten(0, 1)


def _lay_end_to_end(states: Tensor) -> Tensor:
    """(B, heads, T, d) as (B * T, heads, d): a view, since the projections left them in that order."""
    return states.transpose(1, 2).flatten(0, 1)


def _document_mask(
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of `attend_by_document`: an empty one where rows hold several documents, else the stock one.

    transformers asks for a mask once per forward pass and forbids skipping it where position_ids restart. The
    empty tensor costs nothing and lets a forgotten `document_lengths` be distinguished from a row of one document.
    """
    if attention_mask is None and not allow_is_causal_skip:
        return torch.empty(0, dtype=torch.bool, device=device)
    mask: Tensor | None = sdpa_mask(
        attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, device=device, **kwargs
    )
    return mask


def _read_rows(documents: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Lengths of each row's documents."""
    if isinstance(documents, Tensor):
        return [_lengths_from_positions(row) for row in documents.reshape(-1, documents.shape[-1])]
    rows = [[row] if isinstance(row, int) else list(row) for row in documents]
    flat = all(isinstance(row, int) for row in documents)
    return [[length for row in rows for length in row]] if flat else rows


def _lengths_from_positions(position_ids: Tensor) -> list[int]:
    begins = (position_ids.diff() != 1).nonzero().squeeze(1).add(1).tolist()
    bounds = [0, *begins, len(position_ids)]
    return [end - begin for begin, end in pairwise(bounds)]


def _why_no_flash(device_type: str) -> str | None:
    """What flash attention lacks here; None where it runs."""
    if device_type != "cuda":
        return f"a GPU, not device {device_type}"
    if not is_flash_attn_2_available():
        return "the package flash-attn (pip install flash-attn --no-build-isolation)"
    if torch.cuda.get_device_capability() < (8, 0):
        return "a GPU of compute capability 8.0 or later"
    return None


def _why_no_varlen(device_type: str) -> str | None:
    """What torch's own kernel for documents of differing lengths lacks here; None where it runs."""
    if device_type != "cuda":
        return f"a GPU, not device {device_type}"
    if not has_varlen_attention():
        return f"torch 2.13 or later, not {torch.__version__}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "a GPU of compute capability 8.0 or later"
    return None


ALL_ATTENTION_FUNCTIONS.register(DOCUMENTS, attend_by_document)
ALL_MASK_ATTENTION_FUNCTIONS.register(DOCUMENTS, _document_mask)
ALL_ATTENTION_FUNCTIONS.register(VARLEN, attend_in_one_call)
ALL_MASK_ATTENTION_FUNCTIONS.register(VARLEN, _document_mask)
ALL_ATTENTION_FUNCTIONS.register(FLASH, attend_by_flash)
ALL_MASK_ATTENTION_FUNCTIONS.register(FLASH, _document_mask)
