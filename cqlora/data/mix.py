"""Which records train and which are held out: splits, duplicates, samples, weights, all by hash."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cqlora.config.choices import Deduplication
from cqlora.config.schema import DataConfig, SourceConfig
from cqlora.data.collect import UNDECIDED, Gathered
from cqlora.data.duplicates import candidate_pairs, find_near_duplicates, write_signatures
from cqlora.data.keys import assign_splits, fractions, mix_keys
from cqlora.data.records import SPLITS
from cqlora.data.workers import Workers

TRAIN, VAL, TEST = range(len(SPLITS))

CountTokens = Callable[[Gathered, np.ndarray], np.ndarray]
"""(source, record numbers) → int64, tokens of each."""

Tick = Callable[[int], None]
"""(records compared so far)."""


@dataclass(slots=True)
class Chosen:
    """What is taken of a source."""

    gathered: Gathered
    splits: np.ndarray
    """uint8 (records,)."""
    kept: np.ndarray
    """bool (records,)."""
    repeats: np.ndarray
    """uint16 (records,): times a training record stands in the mix."""
    pooled: bool = False
    """The files' own split was set aside, since what it holds out is what it trains on."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Records not kept, by reason."""

    def leave_out(self, mask: np.ndarray, reason: str) -> None:
        """Drop the records of `mask` that were kept so far."""
        mask = mask & self.kept
        self.left_out[reason] += int(mask.sum())
        self.kept &= ~mask


def sample_size(source: SourceConfig, evenly: int | None) -> int | None:
    """Records to take of a source; None takes all."""
    sizes = [size for size in (source.sample, evenly) if size is not None]
    return min(sizes) if sizes else None


def even_shares(total: int, names: list[str]) -> dict[str, int]:
    """`total` over `names`, the remainder one each to the first."""
    share, remainder = divmod(total, len(names))
    return {name: share + (index < remainder) for index, name in enumerate(names)}


def records_to_keep(size: int | None) -> int | None:
    """Training records to keep while reading, so that `size` remain when duplicates and held-out texts are gone."""
    if size is None:
        return None
    return size + size // 4 + 1000


def begin_choice(gathered: Gathered, data: DataConfig) -> Chosen:
    """The choice to begin with: every record kept, and assigned to its split."""
    declared = gathered.index["split"]
    by_hash = assign_splits(gathered.index["family"], data.val_fraction, data.test_fraction)
    pooled = repeats_itself(gathered)
    splits = by_hash if pooled else np.where(declared == UNDECIDED, by_hash, declared)
    if pooled and data.val_fraction and len(splits) and not (splits == VAL).any():
        # Such a source is a handful of texts: hold out one rather than none.
        keys = gathered.index["family"]
        splits[keys == keys[np.argmin(mix_keys(keys, "held-out"))]] = VAL
    records = len(gathered.index)
    return Chosen(gathered, splits, np.ones(records, dtype=bool), np.ones(records, dtype=np.uint16), pooled)


def repeats_itself(gathered: Gathered) -> bool:
    """Whether more than half of a source's training texts stand in its own validation or test files.

    Taking them out of training would leave little of it; such a split is none, and a hash decides instead.
    """
    keys, declared = gathered.index["duplicate_key"], gathered.index["split"]
    training = np.unique(keys[declared == TRAIN])
    held_out = keys[(declared == VAL) | (declared == TEST)]
    return len(training) > 0 and 2 * int(np.isin(training, held_out).sum()) > len(training)


def drop_duplicates(chosen: list[Chosen]) -> None:
    """Within each split, across sources, keep the first of records with equal words."""
    for split in range(len(SPLITS)):
        seen = np.concatenate([each.gathered.index["duplicate_key"][each.splits == split] for each in chosen])
        _, first = np.unique(seen, return_index=True)
        repeated = np.ones(len(seen), dtype=bool)
        repeated[first] = False
        start = 0
        for each in chosen:
            members = np.flatnonzero(each.splits == split)
            mask = np.zeros(len(each.kept), dtype=bool)
            mask[members] = repeated[start : start + len(members)]
            each.leave_out(mask, "duplicate")
            start += len(members)


def drop_held_out(chosen: list[Chosen]) -> None:
    """Take out of training what validation and test hold."""
    held_out = np.unique(
        np.concatenate([each.gathered.index["duplicate_key"][each.splits != TRAIN] for each in chosen])
    )
    for each in chosen:
        leaked = np.isin(each.gathered.index["duplicate_key"], held_out) & (each.splits == TRAIN)
        each.leave_out(leaked, "held out elsewhere")


def drop_near_duplicates(chosen: list[Chosen], data: DataConfig, staging: Path, workers: Workers, tick: Tick) -> None:
    """Drop records whose words are nearly those of another, which stands before them or is held out.

    Validation comes first, then test, then training, each in the order of reading, so that a training
    text that is nearly a held-out one goes, and the held-out one stays.
    """
    order = np.concatenate(
        [
            np.stack([np.full(len(numbers), source), numbers], axis=1)
            for split in (VAL, TEST, TRAIN)
            for source, each in enumerate(chosen)
            for numbers in [np.flatnonzero(each.kept & (each.splits == split))]
        ]
    )
    records = np.zeros(len(order), dtype=[("source", np.int32), ("offset", np.uint64), ("length", np.uint32)])
    records["source"] = order[:, 0]
    for source, each in enumerate(chosen):
        of_source = order[:, 0] == source
        for column in ("offset", "length"):
            records[column][of_source] = each.gathered.index[column][order[of_source, 1]]
    spools = [str(each.gathered.spool) for each in chosen]
    file = staging / "signatures.bin"
    bands = write_signatures(records, spools, data.clean.near_threshold, file, workers, tick)
    if len(records):
        signatures = np.memmap(file, dtype=np.uint64, mode="r").reshape(-1, bands)
        dropped = find_near_duplicates(records, spools, data.clean.near_threshold, candidate_pairs(signatures).tolist())
        for source, each in enumerate(chosen):
            mask = np.zeros(len(each.kept), dtype=bool)
            mask[order[dropped & (order[:, 0] == source), 1]] = True
            each.leave_out(mask, "near duplicate")
    file.unlink()


def sampling_order(each: Chosen, seed: int) -> np.ndarray:
    """Numbers of the kept records that sampling is about, smallest sampling hash first.

    What the files themselves hold out is not among them and stays.
    """
    index = each.gathered.index
    members = np.flatnonzero(each.kept & np.isin(index["split"], (UNDECIDED, TRAIN)))
    return members[np.argsort(mix_keys(index["key"][members], "sample", seed), kind="stable")]


def take_sample(each: Chosen, size: int, seed: int) -> None:
    """Keep records in the order of their sampling hash until `size` of them train.

    Those held out by hash come on top, as many as fall between them, so that their share stays what it was.
    """
    order = sampling_order(each, seed)
    training = np.cumsum(each.splits[order] == TRAIN)
    keep_first(each, order, int(np.searchsorted(training, size)) + 1)


def take_tokens(each: Chosen, budget: int, seed: int, count_tokens: CountTokens) -> None:
    """Keep records in the order of their sampling hash until `budget` tokens train."""
    order = sampling_order(each, seed)
    taken, tokens = 0, 0
    while taken < len(order) and tokens < budget:
        numbers = order[taken : taken + 512]
        counted = count_tokens(each.gathered, numbers) * (each.splits[numbers] == TRAIN)
        total = np.cumsum(counted) + tokens
        reached = min(int(np.searchsorted(total, budget)) + 1, len(total))
        taken += reached
        tokens = int(total[reached - 1])
    keep_first(each, order, taken)


def keep_first(each: Chosen, order: np.ndarray, count: int) -> None:
    """Keep the first `count` records of `order`, and leave out the others of it."""
    mask = np.zeros(len(each.kept), dtype=bool)
    mask[order[count:]] = True
    each.leave_out(mask, "not sampled")


def apply_weight(each: Chosen, weight: float, seed: int) -> None:
    """Repeat training records `weight` times in the mix: whole times all of them, a fraction some of them."""
    whole = int(weight)
    draw = fractions(mix_keys(each.gathered.index["key"], "weight", seed))
    each.repeats = (whole + (draw < weight - whole)).astype(np.uint16)
    each.repeats[each.splits != TRAIN] = 1
    each.leave_out(each.repeats == 0, "weighted out")


def choose_records(
    sources: list[Gathered],
    data: DataConfig,
    sizes: dict[str, int | None],
    seed: int,
    count_tokens: CountTokens,
    drop_near: Callable[[list[Chosen]], None],
) -> list[Chosen]:
    """The mix: every source's records with their split, and whether and how often they are taken.

    `drop_near` is drop_near_duplicates with its working folder given.
    """
    chosen = [begin_choice(gathered, data) for gathered in sources]
    if data.clean.deduplicate is not Deduplication.none:
        drop_duplicates(chosen)
    drop_held_out(chosen)
    if data.clean.deduplicate is Deduplication.near:
        drop_near(chosen)
    for each in chosen:
        source, size = each.gathered.source, sizes[each.gathered.name]
        if size is not None:
            sampled_away = each.gathered.records - len(each.gathered.index)
            take_sample(each, size, seed)
            each.left_out["not sampled"] += sampled_away
        if source.sample_tokens is not None:
            take_tokens(each, source.sample_tokens, seed, count_tokens)
        if source.weight != 1.0:
            apply_weight(each, source.weight, seed)
    return chosen
