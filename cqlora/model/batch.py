"""One micro batch on its device: packs laid end to end in a single row, and where each document begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cqlora.model.attention import document_kwargs
from cqlora.model.loss import IGNORED


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
    labels: torch.Tensor
    """(1, T) int64, IGNORED where a token is not predicted; the first of every document is never."""
    source_ids: torch.Tensor
    """(T,) int64, the source of each token."""
    document_lengths: list[int]
    attention: dict[str, Any]
    """Document boundaries, as the attention functions take them."""


def build_batch(packs: Sequence[PackOfDocuments], device: torch.device) -> Batch:
    """Lay packs end to end."""
    lengths = [length for pack in packs for length in pack.document_lengths]
    tokens = np.concatenate([pack.token_ids for pack in packs])
    mask = np.concatenate([pack.label_mask for pack in packs])
    starts = np.cumsum([0, *lengths[:-1]])
    mask[starts] = False
    sources = np.repeat([source for pack in packs for source in pack.source_ids], lengths)
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
    return Batch(
        input_ids=torch.from_numpy(tokens)[None].to(device, non_blocking=True),
        position_ids=torch.from_numpy(positions)[None].to(device, non_blocking=True),
        labels=torch.from_numpy(np.where(mask, tokens, IGNORED))[None].to(device, non_blocking=True),
        source_ids=torch.from_numpy(sources.astype(np.int64)).to(device, non_blocking=True),
        document_lengths=lengths,
        attention=document_kwargs(lengths, device),
    )


def count_labels(packs: Sequence[PackOfDocuments]) -> int:
    """Label tokens of some packs."""
    return sum(int(pack.label_mask.sum()) for pack in packs)
