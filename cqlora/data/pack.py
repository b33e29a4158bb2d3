"""Documents into packs of `sequence_length` tokens, none cut: best-fit decreasing, then loose packs packed anew."""

from dataclasses import dataclass

import numpy as np

FULL = 0.98
"""Packs that are filled below this share are taken apart and packed anew by subset sums."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Which documents share a pack."""

    documents: np.ndarray
    """uint32 (documents,): document indices, pack after pack."""
    offsets: np.ndarray
    """uint64 (packs + 1,): where each pack begins in `documents`."""


def pack_documents(lengths: np.ndarray, sequence_length: int) -> Packing:
    """Pack documents of `lengths` tokens, each at most `sequence_length`.

    Best-fit decreasing leaves hardly any room in a large corpus. Where documents are few, or of much the
    same length, its loose packs are packed anew by subset sums, and the better of the two is kept.
    Documents of equal length keep their order.
    """
    lengths = lengths.astype(np.int64)
    pack_of = best_fit_decreasing(lengths, sequence_length)
    filled = np.bincount(pack_of, weights=lengths)
    loose = filled < FULL * sequence_length
    members = np.flatnonzero(loose[pack_of])
    repacked = fill_by_sums(lengths[members], sequence_length)
    if len(members) and repacked.max() + 1 < loose.sum():
        renumbered = np.cumsum(~loose) - 1
        tight = int((~loose).sum())
        pack_of = renumbered[pack_of]
        pack_of[members] = tight + repacked
    longest_first = np.argsort(-lengths, kind="stable")
    by_pack = longest_first[np.argsort(pack_of[longest_first], kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pack_of))]) if len(lengths) else np.zeros(1)
    return Packing(by_pack.astype(np.uint32), offsets.astype(np.uint64))


def best_fit_decreasing(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    """int64 (documents,): each document's pack; longest first, each into the fullest pack that has room.

    Open packs are kept by the room left in them, and a bit mask over room finds the tightest that fits,
    so the cost grows with the number of documents and not with that of open packs.
    """
    order = np.argsort(-lengths, kind="stable")
    pack_of = np.empty(len(lengths), dtype=np.int64)
    by_room: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    rooms = 0  # bit r is set where a pack with r tokens of room is open
    packs = 0
    for start in range(0, len(order), 1 << 16):
        block = order[start : start + (1 << 16)]
        placed = []
        for length in lengths[block].tolist():
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                pack = by_room[room].pop()
                if not by_room[room]:
                    rooms ^= 1 << room
            else:
                room, pack = sequence_length, packs
                packs += 1
            left = room - length
            if left:
                by_room[left].append(pack)
                rooms |= 1 << left
            placed.append(pack)
        pack_of[block] = placed
    return pack_of


def fill_by_sums(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    """int64 (documents,): each document's pack; the longest left opens one, the best sum of others fills it.

    (Gupta and Ho, "A new heuristic algorithm for the one-dimensional bin-packing problem", 1999.)
    """
    waiting: dict[int, list[int]] = {}
    for document in np.argsort(-lengths, kind="stable").tolist()[::-1]:
        waiting.setdefault(int(lengths[document]), []).append(document)
    distinct = sorted(waiting, reverse=True)
    pack_of = np.empty(len(lengths), dtype=np.int64)
    pack = 0
    while distinct:
        opening = distinct[0]
        pack_of[waiting[opening].pop()] = pack
        for length in best_sum(distinct, waiting, sequence_length - opening):
            pack_of[waiting[length].pop()] = pack
        distinct = [length for length in distinct if waiting[length]]
        pack += 1
    return pack_of


def best_sum(distinct: list[int], waiting: dict[int, list[int]], room: int) -> list[int]:
    """Lengths of waiting documents whose sum comes closest to `room` from below, long ones preferred."""
    within = (1 << (room + 1)) - 1
    reached = 1  # bit s is set where some documents add up to s
    steps: list[tuple[int, int]] = []
    for length in distinct:
        for _ in range(min(len(waiting[length]), room // length)):
            if reached >> room & 1:
                break
            steps.append((length, reached))
            reached |= reached << length & within
    total = reached.bit_length() - 1
    chosen = []
    for length, before in reversed(steps):
        if not before >> total & 1:
            chosen.append(length)
            total -= length
    return chosen
