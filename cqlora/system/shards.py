"""Safetensors by streaming: tensors are read and written in blocks of rows, never a whole model in memory.

The format (huggingface/safetensors, "Format"): eight bytes of header length, a JSON header of names, dtypes,
shapes and byte ranges, then the data. As shapes are known beforehand, the header is written before any data.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from cqlora.errors import ModelError
from cqlora.system.documents import write_json
from cqlora.system.refusals import require_space
from cqlora.system.tensor_files import INDEX, StoredTensor, open_plain, read_header, read_tensors

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
BLOCK_BYTES = 64 << 20
READ_BYTES = 8 << 20
"""Small enough for the allocator to hand the same memory out again, which saves a page fault every 4 KiB."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, safetensors dtype and shape, known before its data."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class TensorSource(Protocol):
    """A model whose tensors come one at a time: a folder of shards, a GGUF file, Meta's files."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The tensors by name, in the order in which they are written."""

    def blocks(self, name: str) -> Iterable[torch.Tensor]:
        """The tensor's rows in order, some at a time; joined along dimension 0 they are the tensor."""


class ShardReader:
    """The tensors of a model folder (`model.safetensors`, or shards with an index), or of one file.

    Bytes are read, not mapped: pages of a mapped file stay resident, and a merged model's all would.
    """

    def __init__(self, folder: Path, file: Path | None = None) -> None:
        """Read the headers of a folder's shards, or of `file` alone.

        Raises:
            ModelError: a shard that the index names is missing or cannot be read, or none is there.
        """
        self.folder = folder
        self.stored: dict[str, StoredTensor] = (
            read_tensors(folder) if file is None else {tensor.name: tensor for tensor in read_header(file)}
        )
        self.specs = {name: TensorSpec(name, stored.dtype, stored.shape) for name, stored in self.stored.items()}

    def file_of(self, name: str) -> Path:
        """The shard that holds a tensor."""
        return self.stored[name].file

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        spec = self.specs[name]
        return next(self._read_rows(name, spec.shape[0] if spec.shape else 1))

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's rows, about 8 MiB at a time, each block in memory of its own."""
        spec = self.specs[name]
        row_bytes = spec.nbytes // max(1, spec.shape[0]) if spec.shape else spec.nbytes
        return self._read_rows(name, max(1, READ_BYTES // max(1, row_bytes)))

    def _read_rows(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        spec, stored = self.specs[name], self.stored[name]
        total = spec.shape[0] if spec.shape else 1
        with open_plain(stored.file) as stream:
            stream.seek(stored.start)
            for start in range(0, max(1, total), max(1, rows)):
                shape = (min(rows, total - start), *spec.shape[1:]) if spec.shape else ()
                block = torch.empty(shape, dtype=DTYPES[spec.dtype])
                _fill(stream, block, stored.file)
                yield block


def split_rows(tensor: torch.Tensor, block_bytes: int = BLOCK_BYTES, multiple: int = 1) -> Iterator[torch.Tensor]:
    """Views of a tensor's rows, at most `block_bytes` each, in multiples of `multiple` rows."""
    if tensor.dim() == 0 or tensor.nbytes <= block_bytes:
        yield tensor
        return
    row_bytes = tensor.nbytes // tensor.shape[0]
    rows = max(multiple, block_bytes // row_bytes // multiple * multiple)
    yield from torch.split(tensor, rows)


def plan_shards(specs: Iterable[TensorSpec], max_shard_size: int) -> list[list[TensorSpec]]:
    """Fill shards in order; one exceeds `max_shard_size` bytes only where a single tensor does."""
    shards: list[list[TensorSpec]] = []
    filled = math.inf
    for spec in specs:
        if filled + spec.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards


def write_shards(
    folder: Path,
    specs: Iterable[TensorSpec],
    produce: Callable[[TensorSpec], Iterable[torch.Tensor]],
    max_shard_size: int = 4 * 10**9,
) -> dict[str, str]:
    """Write tensors as `model*.safetensors` with an index where there are several; return each one's sha256.

    `produce` is asked for one tensor after the other, in order, and gives it in blocks of rows.
    """
    specs = list(specs)
    require_space(folder, sum(spec.nbytes for spec in specs))
    shards = plan_shards(specs, max_shard_size)
    names = shard_names(len(shards))
    digests: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        digests |= write_shard(folder / name, shard, produce)
    if len(shards) > 1:
        write_index(folder, dict(zip(names, shards, strict=True)))
    return digests


def shard_names(count: int) -> list[str]:
    """File names of `count` shards, as transformers writes them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def write_shard(
    file: Path, specs: list[TensorSpec], produce: Callable[[TensorSpec], Iterable[torch.Tensor]]
) -> dict[str, str]:
    """Write one safetensors file: the header of `specs`, then each tensor's blocks as they come.

    A block is still read after the next one was asked for: `produce` gives each in memory that stays as it is.

    Returns:
        sha256 of each tensor's bytes by its name, taken where they are written.
    """
    digests = {spec.name: hashlib.sha256() for spec in specs}
    require_space(file.parent, sum(spec.nbytes for spec in specs))
    with file.open("wb", buffering=0) as stream, ThreadPoolExecutor(max_workers=1) as writer:
        pending: Future[Any] = writer.submit(stream.write, _encode_header(specs))
        for spec in specs:
            rows = 0
            for block in produce(spec):
                _check_block(spec, block)
                # One block is written while the next is made; a longer queue would only hold memory.
                pending.result()
                pending = writer.submit(_write_all, stream, block, digests[spec.name])
                rows += block.shape[0] if block.dim() else 1
            expected = spec.shape[0] if spec.shape else 1
            assert rows == expected, f"{spec.name} got {rows} rows where its header promises {expected}"
        pending.result()
    return {name: digest.hexdigest() for name, digest in digests.items()}


def write_index(folder: Path, shards: Mapping[str, Iterable[TensorSpec]]) -> None:
    """Write the index of a model in several shards."""
    weight_map = {spec.name: name for name, specs in shards.items() for spec in specs}
    total = sum(spec.nbytes for specs in shards.values() for spec in specs)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype."""
    return _DTYPE_NAMES[dtype]


def _fill(stream: io.RawIOBase, block: torch.Tensor, file: Path) -> None:
    data = memoryview(block.reshape(-1).view(torch.uint8).numpy().data)
    while data:
        count = stream.readinto(data) or 0
        if not count:
            raise ModelError(f"{file} ends before its data does; it is truncated, fetch it again.")
        data = data[count:]


def _encode_header(specs: list[TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # Data that begins at a cache line's edge is multiplied in place, once mapped, up to 1.4 times as fast.
    encoded += b" " * (-(8 + len(encoded)) % 64)
    return len(encoded).to_bytes(8, "little") + encoded


def _check_block(spec: TensorSpec, block: torch.Tensor) -> None:
    assert block.dtype == DTYPES[spec.dtype], f"{spec.name} is {block.dtype}, its header promises {spec.dtype}"
    assert tuple(block.shape[1:]) == spec.shape[1:], f"{spec.name} has rows of {block.shape[1:]}, not {spec.shape}"


def _write_all(stream: io.RawIOBase, block: torch.Tensor, digest: Any) -> None:
    data = memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(data)
    while data:
        data = data[stream.write(data) or 0 :]
