"""One micro batch on its device: packs laid end to end in a single row, and where each document begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cqlora.model.attention import document_kwargs
from cqlora.model.transfer import send


class PackOfDocuments(Protocol):
    """What is read of a pack of a token cache."""

    @property
    def token_ids(self) -> NDArray[np.int64]: ...
    @property
    def label_mask(self) -> NDArray[np.bool_]: ...
    @property
    def document_lengths(self) -> list[int]: ...
    @property
    def source_ids(self) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of a micro batch, flattened: attention is by document, so packs need no dimension of their own."""

    input_ids: torch.Tensor
    """(1, T) int64."""
    position_ids: torch.Tensor
    """(1, T) int64, from 0 in every document."""
    label_positions: torch.Tensor
    """(L,) int64, which of the T tokens are predicted, in order; the first of a document never is."""
    targets: torch.Tensor
    """(L,) int64, the ids of those tokens."""
    label_sources: torch.Tensor
    """(L,) int64, the source of each of those tokens; on the host, where losses are counted."""
    document_lengths: list[int]
    attention: dict[str, Any]
    """Document boundaries, as the attention functions take them."""


def build_batch(packs: Sequence[PackOfDocuments], device: torch.device) -> Batch:
    """Lay packs end to end.

    All that depends on the data is worked out here, on the host, so that a device is never waited for in a micro batch.
    """
    lengths = [length for pack in packs for length in pack.document_lengths]
    tokens = np.concatenate([pack.token_ids for pack in packs])
    mask = np.concatenate([pack.label_mask for pack in packs])
    starts = np.cumsum([0, *lengths[:-1]])
    mask[starts] = False
    labels = np.flatnonzero(mask)
    sources = np.repeat([source for pack in packs for source in pack.source_ids], lengths)
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
    return Batch(
        input_ids=send(torch.from_numpy(tokens), device)[None],
        position_ids=send(torch.from_numpy(positions), device)[None],
        label_positions=send(torch.from_numpy(labels), device),
        targets=send(torch.from_numpy(tokens[labels]), device),
        label_sources=torch.from_numpy(sources[labels].astype(np.int64)),
        document_lengths=lengths,
        attention=document_kwargs(lengths, device),
    )


def count_labels(packs: Sequence[PackOfDocuments]) -> int:
    """Label tokens of some packs."""
    return sum(int(pack.label_mask.sum()) for pack in packs)
