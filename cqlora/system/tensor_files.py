"""Which safetensors files a model's folder is made of, and what their headers promise, checked before use.

The format (huggingface/safetensors, "Format"): eight bytes of header length, a JSON header of names, dtypes,
shapes and byte ranges, then the data.
"""

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from cqlora.errors import ModelError
from cqlora.system.documents import first_words, read_object, shorten, take

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    name: str
    dtype: str
    """safetensors' name of it."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Byte of the file at which its data begins."""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def list_tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: those that the index names, or the only one.

    transformers takes `model.safetensors` where there is one, and the index where there is not; a folder in which
    the two disagree would be another model to each reader.

    Raises:
        ModelError: there is none, a file that the index names is missing or outside, or the two disagree.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise ModelError(f"{folder} has no {SINGLE} and no {INDEX}; give the folder of a Hugging Face model.")
        return [folder / SINGLE]
    names = sorted(set(_weight_map(index).values()))
    if SINGLE not in names and (folder / SINGLE).exists():
        raise ModelError(
            f"{folder} has a {SINGLE} beside an {INDEX} that does not name it, so it holds two models; remove one."
        )
    for name in names:
        if not (folder / name).exists():
            raise ModelError(f"{folder / name} is missing though {INDEX} names it; fetch that file again.")
    return [folder / name for name in names]


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model's folder, file by file, in the order of their data.

    Raises:
        ModelError: as list_tensor_files and read_header; a tensor is in two files, or not where the index says.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in list_tensor_files(folder):
        for tensor in read_header(file):
            if (other := tensors.get(tensor.name)) is not None:
                raise ModelError(
                    f"{folder} has {tensor.name} in {other.file.name} and in {file.name}; fetch the model again."
                )
            tensors[tensor.name] = tensor
    if (folder / INDEX).exists():
        for name, file_name in _weight_map(folder / INDEX).items():
            if name not in tensors or tensors[name].file.name != file_name:
                raise ModelError(f"{folder / file_name} has no {name} though {INDEX} says so; fetch both files again.")
    return tensors


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file in the order of their data, which fills the file without a gap.

    Raises:
        ModelError: the file cannot be read, is truncated or damaged, or has a type that is unknown here.
    """
    try:
        with open_plain(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        header.pop("__metadata__", None)
        tensors = [_read_entry(file, name, entry, 8 + length) for name, entry in header.items()]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
        _check_filled(tensors, 8 + length, size)
    except (OSError, ValueError, RecursionError) as error:
        reason = first_words(error)
        raise ModelError(f"{file} cannot be read ({reason}); it is truncated or damaged, fetch it again.") from error
    return tensors


def open_plain(file: Path) -> Any:
    """Open a plain file, or what a link leads to, for reading; never wait for a pipe's other end.

    Raises:
        OSError: it is a pipe, a device or a folder.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError("it is no plain file")
    return file.open("rb", buffering=0)


def _weight_map(index: Path) -> dict[str, str]:
    places = take(read_object(index), "weight_map", index, dict)
    if not places:
        raise ModelError(f"{index} names no tensor; fetch it again.")
    for name in places.values():
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise ModelError(
                f"{index} names {shorten(name)}, which is no file of the folder itself; give a model whose files are "
                "in its own folder."
            )
    return dict(places)


def _read_entry(file: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """One entry of a header, whose byte range is what its shape and dtype make."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name[:60]} is described by no object")
    dtype, shape, offsets = str(entry.get("dtype")), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{name[:60]} is of the unknown type {shorten(dtype, 20)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise ValueError(f"{name[:60]} has no shape or no place")
    tensor = StoredTensor(name, dtype, tuple(shape), file, data + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise ValueError(f"{name[:60]} has {offsets[1] - offsets[0]} bytes where its shape needs {tensor.nbytes}")
    return tensor


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in value)


def _check_filled(tensors: list[StoredTensor], start: int, size: int) -> None:
    for tensor in tensors:
        if tensor.start != start:
            raise ValueError(f"{tensor.name[:60]} does not begin where the tensor before it ends")
        start += tensor.nbytes
    if start != size:
        raise ValueError(f"it has {size:,} bytes where its header promises {start:,}")
