"""A source's rows, parsed and cleaned into a spool file, with an index small enough to be held in memory."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from cqlora.config.choices import LANGUAGES, Deduplication
from cqlora.config.schema import CleanConfig, SourceConfig
from cqlora.data.clean import Cleaner
from cqlora.data.keys import assign_splits, content_key, mix_keys
from cqlora.data.language import detect_language
from cqlora.data.records import SPLITS, Conversation, RawRow, Record, RowDropped, RowError, dump_record, text_of
from cqlora.data.sources import PARSERS
from cqlora.data.sources.fields import printable
from cqlora.data.sources.files import decode_body
from cqlora.data.wording import Wording
from cqlora.data.workers import Workers
from cqlora.errors import DataError

UNDECIDED = 255
"""In place of a split: a hash of the document decides."""

_BATCH_BYTES = 1 << 19
_BATCH_ROWS = 2048
_EARLY_ROWS = 1000
"""Rows read before too many rejections stop a source; before that, at its end."""

INDEX_TYPE = np.dtype(
    [
        ("offset", np.uint64),
        ("length", np.uint32),
        ("key", np.uint64),
        ("duplicate_key", np.uint64),
        ("family", np.uint64),
        ("split", np.uint8),
        ("language", np.uint8),
    ]
)
"""A record in the spool. `key` is of the text as it was read, `duplicate_key` as it was cleaned, `family` of what
records that are held out together have in common: `key`, unless the record names something."""


@dataclass(slots=True)
class CollectedBatch:
    """What parsing and cleaning a batch of rows gave."""

    spool: bytes
    index: np.ndarray
    """INDEX_TYPE (records,), offsets from the batch's own start."""
    rejected: list[tuple[str, int, str]]
    """File, line, reason."""
    rows: int
    counts: Counter[str]
    """Repairs and changes, by rule."""
    dropped: Counter[str]
    """Records and rows that a rule dropped, by rule."""
    further: int = 0
    """Records beyond the first of their row."""


@dataclass(slots=True)
class Gathered:
    """A source in its spool file."""

    name: str
    source: SourceConfig
    spool: Path
    index: np.ndarray
    """INDEX_TYPE (records,), in the order of reading."""
    read: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    records: int = 0
    """Records that passed every rule, before sampling."""
    further: int = 0
    """Records beyond the first of their row."""


@lru_cache(maxsize=4)
def make_cleaner(key: str) -> Cleaner:
    """The cleaner for (clean configuration, language) as JSON, made once per process."""
    config, language = json.loads(key)
    config["deduplicate"] = Deduplication(config["deduplicate"])
    return Cleaner(CleanConfig(**config), language)


def collect_batch(
    source: SourceConfig, cleaner_key: str, wording: Wording | None, rows: list[RawRow]
) -> CollectedBatch:
    """Parse and clean rows; one that cannot be read, or written, is rejected as a whole, with its reason."""
    cleaner = make_cleaner(cleaner_key)
    batch = CollectedBatch(b"", np.zeros(0, dtype=INDEX_TYPE), [], len(rows), Counter(), Counter())
    spool: list[bytes] = []
    entries: list[tuple[int, ...]] = []
    offset = 0
    for row in rows:
        counts: Counter[str] = Counter()
        try:
            parsed = parse_row(row, source, counts)
            cleaned = [cleaner.clean(record, counts) for record in parsed]
            records = list(zip(parsed, (write(record, wording, counts) for record in cleaned), strict=True))
        except RowError as error:
            batch.rejected.append((row.file, row.line, printable(str(error))))
            continue
        except RowDropped as rule:
            batch.dropped[str(rule)] += 1
            records = []
        batch.counts.update(counts)
        batch.further += max(len(records) - 1, 0)
        for raw, record in records:
            refusal = cleaner.refusal(record)
            if refusal:
                batch.dropped[refusal] += 1
                continue
            data = dump_record(record)
            entries.append((offset, len(data), *describe_record(raw, record, source, row.split)))
            spool.append(data)
            offset += len(data)
    batch.spool, batch.index = b"".join(spool), np.array(entries, dtype=INDEX_TYPE)
    return batch


def parse_row(row: RawRow, source: SourceConfig, counts: Counter[str]) -> list[Record]:
    """All records of a row.

    Raises:
        RowError: the row cannot be read.
        RowDropped: a rule leaves the row out.
    """
    try:
        records = list(PARSERS[source.kind](decode_body(row.body), source, counts))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # An exception that no reader foresaw rejects its row, and does not end the preparation.
        raise RowError(f"cannot be parsed ({type(error).__name__})") from None
    if not records:
        raise RowDropped("nothing in the row")
    return records


def write(record: Record, wording: Wording | None, counts: Counter[str]) -> Record:
    """The record as it is trained; without a wording nobody trains it.

    Raises:
        RowError: the chat template has no place for the conversation.
    """
    if wording is None or not isinstance(record, Conversation) or not all(t.text or t.calls for t in record.turns):
        return record
    return wording.settle(record, counts)


def describe_record(raw: Record, record: Record, source: SourceConfig, split: str | None) -> tuple[int, ...]:
    """The fields of INDEX_TYPE after offset and length."""
    raw_text, text = text_of(raw), text_of(record)
    key = content_key(text)
    raw_key = key if raw_text == text else content_key(raw_text)
    family = content_key(raw.family) if isinstance(raw, Conversation) and raw.family else raw_key
    side = UNDECIDED if split is None else SPLITS.index(split)
    return raw_key, key, family, side, LANGUAGES.index(source.language or detect_language(text))


def batch_rows(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    """Rows in batches of about half a megabyte."""
    batch: list[RawRow] = []
    weight = 0
    for row in rows:
        batch.append(row)
        weight += weigh(row.body)
        if weight >= _BATCH_BYTES or len(batch) >= _BATCH_ROWS:
            yield batch
            batch, weight = [], 0
    if batch:
        yield batch


def weigh(body: Any) -> int:
    """A row's work, as the bytes of plain text that take about as long to parse and clean."""
    if isinstance(body, bytes | str):
        return len(body)
    if isinstance(body, dict):
        weight = sum(weigh(value) for value in body.values())
        # Markup takes so much longer to parse that its batches are made smaller.
        return 8 * weight if "wikitext" in body else weight
    if isinstance(body, list):
        return sum(weigh(value) for value in body)
    return 8


class Spool:
    """Takes batches; under a limit, keeps the records whose sampling hash is smallest.

    The index then stays within a few times the limit, however long the source.
    """

    def __init__(
        self, stream: IO[bytes], limit: int | None, seed: int, unique: bool, held_out: tuple[float, float] = (0, 0)
    ) -> None:
        self.stream = stream
        self.limit = limit
        """Training records to keep."""
        self.seed = seed
        self.unique = unique
        self.held_out = held_out
        """Shares of validation and test, which the limit does not count."""
        self.end = 0
        self.threshold: np.uint64 | None = None
        self.indexes: list[np.ndarray] = []
        self.size = 0
        self.kept = 0
        """Records that the last pruning left."""

    def append(self, batch: CollectedBatch) -> None:
        """Write a batch's records, those past the threshold left out."""
        index = batch.index.copy()
        if self.threshold is not None:
            index = index[~self.sampled(index) | (self.hashes(index) <= self.threshold)]
        if not len(index):
            return
        index["offset"] += np.uint64(self.end)
        self.stream.write(batch.spool)
        self.end += len(batch.spool)
        self.indexes.append(index)
        self.size += len(index)
        if self.limit is not None and self.size > max(3 * self.limit, 2 * self.kept):
            self.prune(self.limit)

    def prune(self, limit: int) -> None:
        """Keep the records of smallest hash until `limit` of them train, and all that the files hold out."""
        index = np.concatenate(self.indexes)
        sampled = self.sampled(index)
        candidates = np.flatnonzero(sampled)
        hashes = self.hashes(index[candidates])
        if self.unique:
            hashes, first = np.unique(hashes, return_index=True)
            candidates = candidates[first]
        order = np.argsort(hashes, kind="stable")
        training = np.cumsum(assign_splits(index["family"][candidates[order]], *self.held_out) == 0)
        order = order[: int(np.searchsorted(training, limit)) + 1]
        if len(order) < len(hashes):
            self.threshold = hashes[order[-1]]
        kept = np.sort(np.concatenate([np.flatnonzero(~sampled), candidates[order]]))
        self.indexes, self.size, self.kept = [index[kept]], len(kept), len(kept)

    def sampled(self, index: np.ndarray) -> np.ndarray:
        """bool: records that are sampled, which those of explicit val and test files are not."""
        mask: np.ndarray = (index["split"] == UNDECIDED) | (index["split"] == 0)
        return mask

    def hashes(self, index: np.ndarray) -> np.ndarray:
        """uint64: the hash by which records are sampled."""
        hashes: np.ndarray = mix_keys(index["key"], "sample", self.seed)
        return hashes

    def index(self) -> np.ndarray:
        """The index of everything kept."""
        return np.concatenate(self.indexes) if self.indexes else np.zeros(0, dtype=INDEX_TYPE)


class RejectionLog:
    """`rejected.jsonl`, and the error when a source has too many of them."""

    def __init__(self, stream: IO[str], max_fraction: float, kept_at: Path) -> None:
        self.stream = stream
        self.max_fraction = max_fraction
        self.kept_at = kept_at

    def write(self, name: str, rejected: list[tuple[str, int, str]]) -> None:
        """One line a rejected row."""
        for file, line, reason in rejected:
            entry = {"source": name, "file": printable(file), "line": line, "reason": reason}
            self.stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def check(self, gathered: Gathered, minimum: int = 1) -> None:
        """Raise DataError when more than the allowed share of at least `minimum` rows was rejected."""
        count = sum(gathered.rejected.values())
        if gathered.read < minimum or count <= self.max_fraction * gathered.read:
            return
        reasons = ", ".join(f"{reason}: {number}" for reason, number in gathered.rejected.most_common(5))
        raise DataError(
            f"source {gathered.name}: {count} of {gathered.read} rows cannot be read ({reasons}), more than "
            f"data.max_rejected_fraction={self.max_fraction} allows; see {self.kept_at}, mend the rows "
            "or raise it."
        )


def collect_source(
    gathered: Gathered,
    rows: Iterable[RawRow],
    clean: CleanConfig,
    spool: Spool,
    log: RejectionLog,
    workers: Workers,
    wording: Wording | None = None,
) -> Iterator[int]:
    """Read a source to its end into the spool; yields the rows read so far.

    Raises:
        DataError: too many rows are rejected.
    """
    settings = {name: getattr(clean, name) for name in CleanConfig.__slots__}
    settings["deduplicate"] = clean.deduplicate.value
    cleaner_key = json.dumps([settings, gathered.source.language])
    function = partial(collect_batch, gathered.source, cleaner_key, wording)
    for _, batch in workers.map_in_order(function, batch_rows(rows)):
        gathered.read += batch.rows
        gathered.rejected.update(reason for _, _, reason in batch.rejected)
        gathered.dropped.update(batch.dropped)
        gathered.counts.update(batch.counts)
        gathered.records += len(batch.index)
        gathered.further += batch.further
        spool.append(batch)
        log.write(gathered.name, batch.rejected)
        log.check(gathered, minimum=_EARLY_ROWS)
        yield gathered.read
    log.check(gathered)
    gathered.index = spool.index()
