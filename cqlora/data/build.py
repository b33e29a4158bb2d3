"""Building a token cache: read, clean, choose, encode, pack."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cqlora.config.choices import LANGUAGES, Deduplication
from cqlora.config.schema import DataConfig, RunConfig
from cqlora.data.chunks import EncodedBatch
from cqlora.data.collect import Gathered, RejectionLog, Spool, collect_batch, collect_source
from cqlora.data.encode import EncodeSettings, EncodeTask, encode_task, open_encoder
from cqlora.data.keys import mix_keys
from cqlora.data.mix import (
    Chosen,
    choose_records,
    drop_near_duplicates,
    even_shares,
    records_to_keep,
    sample_size,
)
from cqlora.data.records import SPLITS
from cqlora.data.sources import read_rows
from cqlora.data.sources.fields import UNUSED
from cqlora.data.sources.hub import require_hub
from cqlora.data.sources.location import Location
from cqlora.data.store import SplitWriter
from cqlora.data.templates import form_of_stage
from cqlora.data.wording import Wording
from cqlora.data.workers import Workers, count_workers
from cqlora.errors import DataError

ReportProgress = Callable[[str, int, int | None], None]
"""(what is being done, how much of it is done, out of how much where that is known)."""

_TASK_BYTES = 1 << 19
_TASK_RECORDS = 4096
_SHOWN_FIELDS = 50
FAST_BYTES = 4 << 20
"""Bytes of source files from which it pays to prove the faster tokenizer and to start worker processes."""
COUNTED_RECORDS = 512
"""Records whose tokens are counted at once, before it is known which of them are taken."""
MEASURED_RECORDS = 200
"""Records of a source on which tokens per Chinese character are measured."""


@dataclass(slots=True)
class SourceTotals:
    """What became of a source, for summary.json."""

    characters: int = 0
    tokens: int = 0
    label_tokens: int = 0
    longest: int = 0
    kept: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    chunks: int = 0
    han_tokens: int = 0
    han_characters: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, batch: EncodedBatch) -> None:
        """Count a batch in."""
        self.characters += int(batch.characters.sum(dtype=np.int64))
        self.tokens += len(batch.tokens)
        self.label_tokens += int(batch.label_tokens.sum(dtype=np.int64))
        per_record = np.bincount(batch.records, weights=batch.lengths)
        self.longest = max(self.longest, int(per_record.max(initial=0)))
        self.chunks += len(batch.lengths)
        self.han_tokens += batch.han_tokens
        self.han_characters += batch.han_characters
        self.counts.update(batch.counts)


def encode_settings(config: RunConfig, folder: Path) -> EncodeSettings:
    """What decides how this run's records become tokens."""
    form = form_of_stage(config.stage, folder)
    return EncodeSettings(
        folder=str(folder),
        sequence_length=config.stage.sequence_length,
        all_tokens=config.stage.name == "pretrain",
        system_prompt=form.system_prompt,
        template=form.source,
        thinking=form.thinking,
    )


def build_cache(
    config: RunConfig,
    locations: dict[str, Location],
    base_folder: Path,
    staging: Path,
    kept_rejections: Path,
    progress: ReportProgress,
) -> dict[str, Any]:
    """Fill `staging` with a whole cache; returns its description.

    Raises:
        DataError: too many rejected rows, nothing left to train on, or a source that cannot be read.
        ModelError: conversations with a base that lacks the chat tokens.
    """
    much = promises_much(locations)
    sizes = sample_sizes(config.data, list(locations))
    with Workers(count_workers(config.data.workers)) as workers, ThreadPoolExecutor(1) as beside:
        if much:
            workers.start_early(collect_batch)
        settings = encode_settings(config, base_folder)
        proof = beside.submit(open_encoder(settings).tokenizer.prove_fast) if much else None
        gathered = gather_sources(
            config.data, locations, sizes, config.seed, staging, kept_rejections, workers, progress, settings.wording
        )
        total = sum(len(each.index) for each in gathered)

        def drop_near(chosen: list[Chosen]) -> None:
            drop_near_duplicates(chosen, config.data, staging, workers, lambda done: progress("comparing", done, total))

        settings = replace(settings, fast=proof is not None and proof.result())
        count = partial(count_tokens, settings, workers)
        chosen = choose_records(gathered, config.data, sizes, config.seed, count, drop_near)
        writer = CacheWriter(chosen, settings, staging, config.seed, workers, progress)
        description = writer.write()
    if not description["splits"]["train"]["documents"]:
        losses = summarize_losses(chosen, writer.totals)
        raise DataError(
            f"data={config.data.name} leaves nothing to train on: of "
            f"{sum(each.read for each in gathered)} rows none is kept ({losses}); "
            "loosen data.clean or name other sources."
        )
    for each in gathered:
        each.spool.unlink()
    return description


def sample_sizes(data: DataConfig, names: list[str]) -> dict[str, int | None]:
    """Records to take of each source; None takes all."""
    evenly = data.sample_evenly
    shares = even_shares(evenly, names) if evenly is not None else {}
    return {name: sample_size(data.sources[name], shares.get(name)) for name in names}


def gather_sources(
    data: DataConfig,
    locations: dict[str, Location],
    sizes: dict[str, int | None],
    seed: int,
    staging: Path,
    kept_rejections: Path,
    workers: Workers,
    progress: ReportProgress,
    wording: Wording | None = None,
) -> list[Gathered]:
    """Read every source into its spool file; conversations that cannot be written so are rejected."""
    found = []
    for location in locations.values():
        require_hub(location)
    unique = data.clean.deduplicate is not Deduplication.none
    held_out = (data.val_fraction, data.test_fraction)
    with (staging / "rejected.jsonl").open("w", encoding="utf-8") as rejections:
        log = RejectionLog(rejections, data.max_rejected_fraction, kept_rejections)
        for number, (name, location) in enumerate(locations.items()):
            source = data.sources[name]
            gathered = Gathered(name, source, staging / f"source-{number}.spool", np.zeros(0))
            with gathered.spool.open("wb") as stream:
                spool = Spool(stream, records_to_keep(sizes[name]), seed, unique, held_out)
                rows = read_rows(location, source)
                for read in collect_source(gathered, rows, data.clean, spool, log, workers, wording):
                    progress(f"reading {name}", read, None)
            found.append(gathered)
    return found


def promises_much(locations: dict[str, Location]) -> bool:
    """Whether the files are large enough for the faster tokenizer and worker processes to pay."""
    size = sum(file.path.stat().st_size for location in locations.values() for file in location.files)
    return size > FAST_BYTES or any(location.dataset for location in locations.values())


def count_tokens(settings: EncodeSettings, workers: Workers, gathered: Gathered, numbers: np.ndarray) -> np.ndarray:
    """int64 (records,): tokens of the numbered records of a source."""
    entries = gathered.index[numbers]
    cuts = range(COUNTED_RECORDS, len(entries), COUNTED_RECORDS)
    tasks = (
        EncodeTask(str(gathered.spool), part["offset"], part["length"], own)
        for part, own in zip(np.split(entries, cuts), np.split(numbers, cuts), strict=True)
    )
    return np.concatenate([counts for _, counts in workers.map_in_order(partial(count_task, settings), tasks)])


def count_task(settings: EncodeSettings, task: EncodeTask) -> np.ndarray:
    """int64 (records,): tokens of a task's records."""
    batch = encode_task(settings, task)
    return np.bincount(batch.records, weights=batch.lengths, minlength=len(task.offsets)).astype(np.int64)


def summarize_losses(chosen: list[Chosen], totals: list[SourceTotals]) -> str:
    """Reasons and numbers over all sources."""
    losses: Counter[str] = Counter()
    for each, written in zip(chosen, totals, strict=True):
        losses += each.gathered.rejected + each.gathered.dropped + each.left_out
        losses.update({reason: number for reason, number in written.counts.items() if reason.endswith("left out")})
    return ", ".join(f"{reason} {number}" for reason, number in losses.most_common(6)) or "there was none"


class CacheWriter:
    """Encodes the chosen records, split by split, into the staging folder."""

    def __init__(
        self,
        chosen: list[Chosen],
        settings: EncodeSettings,
        staging: Path,
        seed: int,
        workers: Workers,
        progress: ReportProgress,
    ) -> None:
        self.chosen = chosen
        self.settings = settings
        self.sequence_length = settings.sequence_length
        self.staging = staging
        self.seed = seed
        self.workers = workers
        self.progress = progress
        self.totals = [SourceTotals() for _ in chosen]
        self.groups = list_groups(chosen)
        self.dtype = open_encoder(settings).tokenizer.dtype

    def write(self) -> dict[str, Any]:
        """All splits; returns the cache's description."""
        splits = {split: self.write_split(number, split) for number, split in enumerate(SPLITS)}
        return {
            "dtype": self.dtype.name,
            "sequence_length": self.sequence_length,
            "sources": [
                {"name": self.chosen[source].gathered.name, "language": LANGUAGES[language]}
                for source, language in self.groups
            ],
            "splits": splits,
            "summary": self.summarize(splits),
        }

    def write_split(self, number: int, split: str) -> dict[str, Any]:
        """Encode and pack one split."""
        writer = SplitWriter(self.staging / split, self.dtype)
        total = sum(int((each.kept & (each.splits == number)).sum()) for each in self.chosen)
        done = 0
        encode = partial(encode_task, self.settings)
        with ExitStack() as stack:
            results = self.workers.map_in_order(encode, self.tasks(number))
            stack.callback(results.close)  # type: ignore[attr-defined]
            for task, batch in results:
                self.totals[task.source].add(batch)
                self.totals[task.source].kept[split] += len(task.numbers)
                records = task.numbers[batch.records]
                each = self.chosen[task.source]
                source_ids = self.source_ids(task.source)[each.gathered.index["language"][records]]
                writer.append(batch, source_ids, each.repeats[records])
                done += len(task.numbers)
                self.progress(f"encoding {split}", done, total)
        self.progress(f"packing {split}", writer.documents, writer.documents)
        return writer.finish(self.sequence_length, self.seed)

    def tasks(self, split: int) -> Iterator[EncodeTask]:
        """The split's records in batches, each of one source; held-out ones in the order of a hash."""
        for source, each in enumerate(self.chosen):
            index = each.gathered.index
            numbers = np.flatnonzero(each.kept & (each.splits == split))
            if split:
                numbers = numbers[np.argsort(mix_keys(index["key"][numbers], "evaluation"), kind="stable")]
            measured = MEASURED_RECORDS if not split else 0
            ends = np.cumsum(index["length"][numbers], dtype=np.int64)
            start = 0
            while start < len(numbers):
                before = ends[start - 1] if start else 0
                end = int(np.searchsorted(ends, before + _TASK_BYTES)) + 1
                end = min(end, start + _TASK_RECORDS, len(numbers))
                entries = index[numbers[start:end]]
                task = EncodeTask(
                    spool=str(each.gathered.spool),
                    offsets=entries["offset"],
                    lengths=entries["length"],
                    numbers=numbers[start:end],
                    source=source,
                    measured=min(measured, end - start),
                )
                yield task
                measured -= task.measured
                start = end

    def source_ids(self, source: int) -> np.ndarray:
        """uint16 (languages,): the id of each of a source's groups."""
        ids = np.zeros(len(LANGUAGES), dtype=np.uint16)
        for number, (owner, language) in enumerate(self.groups):
            if owner == source:
                ids[language] = number
        return ids

    def summarize(self, splits: dict[str, Any]) -> dict[str, Any]:
        """summary.json: what was read, lost and kept, per source, and how full the packs are."""
        return {
            "sources": {
                each.gathered.name: summarize_source(each, totals)
                for each, totals in zip(self.chosen, self.totals, strict=True)
            },
            "splits": {
                split: {
                    "chunks": found["documents"],
                    **{key: found[key] for key in ("tokens", "label_tokens", "packs")},
                    "fill": fill_of(found, self.sequence_length),
                }
                for split, found in splits.items()
            },
        }


def list_groups(chosen: list[Chosen]) -> list[tuple[int, int]]:
    """The (source, language) pairs that occur, in the order of the sources."""
    groups = []
    for source, each in enumerate(chosen):
        languages = np.unique(each.gathered.index["language"][each.kept])
        groups += [(source, int(language)) for language in languages]
    return groups


def fill_of(split: dict[str, Any], sequence_length: int) -> float:
    """Share of the packs' room that tokens take."""
    return round(split["packed_tokens"] / (split["packs"] * sequence_length), 4) if split["packs"] else 0.0


def rank_unused(counts: Counter[str]) -> dict[str, int]:
    """By field that no reader uses, the rows in which it held something; the most frequent first."""
    found = {name.removeprefix(UNUSED): number for name, number in counts.items() if name.startswith(UNUSED)}
    ranked = sorted(found.items(), key=lambda each: (-each[1], each[0]))
    others = sum(number for _, number in ranked[_SHOWN_FIELDS:])
    return dict(ranked[:_SHOWN_FIELDS]) | ({"all other fields": others} if others else {})


def summarize_source(each: Chosen, totals: SourceTotals) -> dict[str, Any]:
    """A source's line of summary.json."""
    counts = each.gathered.counts
    left_out = {reason: number for reason, number in each.left_out.items() if number}
    return {
        "read": each.gathered.read,
        "further_records": each.gathered.further,
        "rejected": dict(each.gathered.rejected),
        "dropped": dict(each.gathered.dropped),
        "duplicates": left_out.pop("duplicate", 0),
        "near_duplicates": left_out.pop("near duplicate", 0),
        "left_out": left_out,
        "own_split_set_aside": each.pooled,
        "changed": {name: number for name, number in counts.items() if not name.startswith(UNUSED)},
        "unused_fields": rank_unused(counts),
        "kept": totals.kept,
        "chunks": totals.chunks,
        "cut": dict(totals.counts),
        "characters": totals.characters,
        "tokens": totals.tokens,
        "tokens_per_chinese_character": (
            round(totals.han_tokens / totals.han_characters, 4) if totals.han_characters else None
        ),
        "label_tokens": totals.label_tokens,
        "longest": totals.longest,
    }
