"""Near duplicates: MinHash finds the candidates, the texts themselves decide."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from cqlora.data.keys import fold_text
from cqlora.data.language import code_points
from cqlora.data.records import load_record, text_of
from cqlora.data.workers import Workers
from cqlora.errors import DataError

PERMUTATIONS = 128
SHINGLE = 5
"""Characters of the n-grams that two texts are compared by, white space and case aside."""
RECALL = 0.99
"""Share of pairs at the threshold that the bands must find."""

_TASK_RECORDS = 512


def choose_bands(threshold: float) -> tuple[int, int]:
    """(bands, rows): the longest bands, and so the fewest candidates, that still reach RECALL at `threshold`.

    Two texts of similarity s share a band with probability 1 - (1 - s^rows)^bands (Leskovec, Rajaraman,
    Ullman, Mining of Massive Datasets, section 3.4).
    """
    for rows in range(PERMUTATIONS, 0, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return PERMUTATIONS, 1


def shingle_hashes(text: str) -> np.ndarray:
    """uint64 (n-grams,): the distinct n-grams of a folded text, hashed; a short text is one n-gram."""
    points = code_points(fold_text(text).decode("utf-8", "surrogatepass")).astype(np.uint64)
    if len(points) < SHINGLE:
        points = np.pad(points, (0, SHINGLE - len(points)))
    windows = np.lib.stride_tricks.sliding_window_view(points, SHINGLE)
    # 21 bits hold a code point: five of them are mixed by odd factors, which loses nothing that matters here.
    factors = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5, 1], np.uint64)
    hashes = (windows * factors).sum(axis=1, dtype=np.uint64)
    return np.unique(hashes ^ (hashes >> np.uint64(29)))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Similarity of two sets of distinct hashes."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def sign_records(bands: int, rows: int, task: tuple[str, np.ndarray, np.ndarray]) -> np.ndarray:
    """uint64 (records, bands): a hash of each band of each record's MinHash signature."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise DataError(
            "data.clean.deduplicate=near needs rensa; install it with `pip install cqlora[data]`."
        ) from None
    shingles = [shingle_hashes(text).tolist() for text in read_texts(*task)]
    matrix = RMinHash.digest_matrix_from_token_hash_sets(shingles, PERMUTATIONS, 1)
    signatures = np.array(matrix.to_rows(), dtype=np.uint64)[:, : bands * rows].reshape(-1, bands, rows)
    hashes = np.full(signatures.shape[:2], 0xCBF29CE484222325, dtype=np.uint64)
    for row in range(rows):
        hashes = (hashes ^ signatures[:, :, row]) * np.uint64(0x100000001B3)
        hashes ^= hashes >> np.uint64(32)
    return hashes


def read_texts(spool: str, offsets: np.ndarray, lengths: np.ndarray) -> Iterator[str]:
    """The words of records in a spool file."""
    with open(spool, "rb") as stream:
        for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
            stream.seek(offset)
            yield text_of(load_record(stream.read(length)))


def write_signatures(
    records: np.ndarray,
    spools: list[str],
    threshold: float,
    file: Path,
    workers: Workers,
    tick: Callable[[int], None],
) -> int:
    """Band hashes of all records, appended to `file`; returns the bands.

    `records` has fields source, offset and length, in the order of precedence.
    """
    bands, rows = choose_bands(threshold)
    tasks = split_tasks(records, spools)
    done = 0
    with file.open("wb") as stream:
        for _, hashes in workers.map_in_order(partial(sign_records, bands, rows), tasks):
            stream.write(hashes.tobytes())
            done += len(hashes)
            tick(done)
    return bands


def split_tasks(records: np.ndarray, spools: list[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(spool, offsets, lengths) of runs of records that share a source."""
    starts = np.flatnonzero(np.diff(records["source"], prepend=-1))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(records)], strict=True):
        for first in range(start, end, _TASK_RECORDS):
            run = records[first : min(first + _TASK_RECORDS, end)]
            yield spools[run["source"][0]], run["offset"], run["length"]


def candidate_pairs(signatures: np.ndarray) -> np.ndarray:
    """int64 (pairs, 2), by the second: (earlier, later) records that share a band, each with its first."""
    pairs = [np.zeros((0, 2), dtype=np.int64)]
    for band in range(signatures.shape[1]):
        column = np.array(signatures[:, band])
        order = np.argsort(column, kind="stable")
        starts = np.concatenate([[True], column[order][1:] != column[order][:-1]])
        leaders = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
        found = np.stack([leaders, order], axis=1)[~starts]
        pairs.append(found)
    joined = np.unique(np.concatenate(pairs), axis=0)
    return joined[np.argsort(joined[:, 1], kind="stable")]


def find_near_duplicates(
    records: np.ndarray, spools: list[str], threshold: float, pairs: Iterable[tuple[int, int]]
) -> np.ndarray:
    """bool (records,): those at least `threshold` like an earlier record that stays."""
    dropped = np.zeros(len(records), dtype=bool)
    cached: tuple[int, np.ndarray] | None = None
    for earlier, later in pairs:
        if dropped[earlier] or dropped[later]:
            continue
        if cached is None or cached[0] != later:
            cached = (later, record_shingles(records[later], spools))
        dropped[later] = jaccard(record_shingles(records[earlier], spools), cached[1]) >= threshold
    return dropped


def record_shingles(record: np.void, spools: list[str]) -> np.ndarray:
    """The n-grams of one record."""
    one = np.array([record])
    return shingle_hashes(next(read_texts(spools[record["source"]], one["offset"], one["length"])))
