"""A split on disk: flat memory-mapped arrays, written as a stream, read a pack at a time."""

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cqlora.data.chunks import EncodedBatch
from cqlora.data.keys import mix_keys
from cqlora.data.pack import pack_documents

SHARD_TOKENS = 1 << 28
"""A new shard begins after this many tokens; no document spans two."""

_DOCUMENT_ARRAYS = {
    "lengths": np.uint32,
    "label_tokens": np.uint32,
    "characters": np.uint32,
    "bytes": np.uint32,
    "source_ids": np.uint16,
}


@dataclass(frozen=True, slots=True)
class Pack:
    """Documents that share one sequence."""

    token_ids: np.ndarray
    """int64 (tokens,)."""
    label_mask: np.ndarray
    """bool (tokens,): True where the token is predicted and counted; never on a document's first token."""
    document_lengths: list[int]
    """Tokens of each document."""
    source_ids: list[int]
    """Of each document, into TokenCache.sources."""
    characters: list[int]
    """Of each document: characters of the text under its labels."""
    bytes: list[int]
    """Of each document: UTF-8 bytes of the text under its labels."""


class SplitWriter:
    """Appends encoded chunks; `finish` packs them."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.dtype = dtype
        self.shards: list[int] = []
        self.tokens = self.label_tokens = self.documents = 0
        self.repeats: list[np.ndarray] = []
        self.streams = {name: (folder / f"{name}.bin").open("wb") for name in _DOCUMENT_ARRAYS}
        self.start_shard()

    def start_shard(self) -> None:
        """Open the next pair of token and label files."""
        number = len(self.shards)
        for kind in ("tokens", "labels"):
            if number:
                self.streams[kind].close()
            self.streams[kind] = (self.folder / f"{kind}-{number:05d}.bin").open("wb")
        self.shards.append(0)

    def append(self, batch: EncodedBatch, source_ids: np.ndarray, repeats: np.ndarray) -> None:
        """Write a batch's chunks; `source_ids` and `repeats` are (chunks,)."""
        if self.shards[-1] and self.shards[-1] + len(batch.tokens) > SHARD_TOKENS:
            self.start_shard()
        columns = {
            "tokens": batch.tokens,
            "labels": batch.labels,
            "lengths": batch.lengths,
            "label_tokens": batch.label_tokens,
            "characters": batch.characters,
            "bytes": batch.utf8_bytes,
            "source_ids": source_ids.astype(np.uint16),
        }
        for name, column in columns.items():
            self.streams[name].write(column.tobytes())
        self.shards[-1] += len(batch.tokens)
        self.tokens += len(batch.tokens)
        self.label_tokens += int(batch.label_tokens.sum())
        self.documents += len(batch.lengths)
        self.repeats.append(repeats.astype(np.uint16))

    def finish(self, sequence_length: int, seed: int) -> dict[str, Any]:
        """Pack the documents, shuffled so that packs mix sources; returns the split's description."""
        for stream in self.streams.values():
            stream.close()
        lengths = read_array(self.folder / "lengths.bin", np.dtype(np.uint32))
        numbers = np.arange(len(lengths), dtype=np.uint64)
        order = np.argsort(mix_keys(numbers, "shuffle", seed), kind="stable").astype(np.uint32)
        repeats = np.concatenate(self.repeats) if self.repeats else np.zeros(0, dtype=np.uint16)
        order = np.repeat(order, repeats[order])
        packing = pack_documents(lengths[order], sequence_length)
        write_array(self.folder / "pack_documents.bin", order[packing.documents])
        write_array(self.folder / "pack_offsets.bin", packing.offsets)
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "label_tokens": self.label_tokens,
            "packs": len(packing.offsets) - 1,
            "packed_tokens": int(lengths[order].sum(dtype=np.int64)),
            "shards": self.shards,
        }


class Split:
    """A split of a token cache, its arrays memory-mapped."""

    def __init__(self, folder: Path, description: dict[str, Any], dtype: np.dtype[Any], sequence_length: int) -> None:
        self.tokens: int = description["tokens"]
        self.label_tokens: int = description["label_tokens"]
        self.documents: int = description["documents"]
        self.packed_tokens: int = description["packed_tokens"]
        """Tokens of all packs; above `tokens` where a source's weight repeats documents."""
        self.sequence_length = sequence_length
        shards = range(len(description["shards"]))
        self._tokens = [read_array(folder / f"tokens-{number:05d}.bin", dtype) for number in shards]
        self._labels = [read_array(folder / f"labels-{number:05d}.bin", np.dtype(np.uint8)) for number in shards]
        self._starts = [0, *np.cumsum(description["shards"])[:-1].tolist()]
        self._columns = {
            name: read_array(folder / f"{name}.bin", np.dtype(kind)) for name, kind in _DOCUMENT_ARRAYS.items()
        }
        lengths = self._columns["lengths"]
        self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._pack_documents = read_array(folder / "pack_documents.bin", np.dtype(np.uint32))
        self._pack_offsets = read_array(folder / "pack_offsets.bin", np.dtype(np.uint64))

    def __len__(self) -> int:
        return len(self._pack_offsets) - 1

    def pack(self, number: int) -> Pack:
        """The pack of this number, from 0 to len(split) - 1."""
        if not 0 <= number < len(self):
            raise IndexError(f"pack {number} of {len(self)}")
        start, end = self._pack_offsets[number : number + 2].tolist()
        return self.gather(self._pack_documents[start:end])

    def packs_of(self, source_id: int, max_tokens: int = 0, max_characters: int = 0) -> list[Pack]:
        """Packs of one source's documents, in their order on disk, until a limit (0: none) is reached.

        Held-out documents lie in the order of a hash, so the first of them are a fair sample. A limit in tokens cuts
        between chunks; one in characters between documents, so that it takes the same ones of every vocabulary.
        """
        documents = np.flatnonzero(self._columns["source_ids"] == source_id)
        if max_tokens:
            total = np.cumsum(self._columns["lengths"][documents], dtype=np.int64)
            documents = documents[: int(np.searchsorted(total, max_tokens)) + 1]
        if max_characters:
            documents = self.take_whole(documents, max_characters)
        lengths = self._columns["lengths"][documents]
        packing = pack_documents(lengths, self.sequence_length)
        bounds = zip(packing.offsets[:-1].tolist(), packing.offsets[1:].tolist(), strict=True)
        return [self.gather(documents[packing.documents[start:end]]) for start, end in bounds]

    def take_whole(self, chunks: np.ndarray, max_characters: int) -> np.ndarray:
        """The first chunks that have `max_characters`, and the others of the document that the last is cut from."""
        total = np.cumsum(self._columns["characters"][chunks], dtype=np.int64)
        taken = int(np.searchsorted(total, max_characters)) + 1
        # A document begins with a control token, and a later chunk of one with a word.
        while taken < len(chunks) and self.first_token(chunks[taken]) != self.first_token(chunks[0]):
            taken += 1
        return chunks[:taken]

    def first_token(self, chunk: int) -> int:
        """The id that a chunk begins with."""
        shard, where = self.locate(int(chunk))
        return int(self._tokens[shard][where.start])

    def gather(self, documents: np.ndarray) -> Pack:
        """A pack of these documents."""
        slices = [self.locate(int(document)) for document in documents]
        columns = {name: column[documents].tolist() for name, column in self._columns.items()}
        return Pack(
            token_ids=np.concatenate([self._tokens[shard][where] for shard, where in slices]).astype(np.int64),
            label_mask=np.concatenate([self._labels[shard][where] for shard, where in slices]).astype(bool),
            document_lengths=columns["lengths"],
            source_ids=columns["source_ids"],
            characters=columns["characters"],
            bytes=columns["bytes"],
        )

    def locate(self, document: int) -> tuple[int, slice]:
        """The shard that holds a document, and where in it."""
        start, end = self._offsets[document : document + 2].tolist()
        shard = bisect_right(self._starts, start) - 1
        return shard, slice(start - self._starts[shard], end - self._starts[shard])


def read_array(file: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """The file as a read-only memory-mapped array."""
    if file.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(file, dtype=dtype, mode="r")


def write_array(file: Path, array: np.ndarray) -> None:
    """The array's bytes and nothing else."""
    file.write_bytes(array.tobytes())
