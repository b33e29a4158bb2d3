"""Rows of a Hugging Face dataset, streamed."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from cqlora.data.records import RawRow
from cqlora.data.sources.files import first_line
from cqlora.data.sources.location import Location
from cqlora.errors import DataError

_SPLITS = {"train": "train", "validation": "val", "test": "test"}


def read_dataset(location: Location) -> Iterator[RawRow]:
    """Rows of the dataset's splits; where it has train alone, a hash of the document decides.

    Raises:
        DataError: `datasets` is not installed or the dataset cannot be reached.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"dataset {location.dataset} needs datasets; install it with `pip install cqlora[data]`."
        ) from None
    try:
        require_hub(location.dataset)
        streams = datasets.load_dataset(location.dataset, location.subset or None, streaming=True)
        names = [name for name in _SPLITS if name in streams]
        for name in names:
            split = _SPLITS[name] if len(names) > 1 else None
            for number, row in enumerate(streams[name], start=1):
                yield RawRow(f"{location.dataset}/{name}", number, row, split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"dataset {location.dataset} cannot be streamed ({first_line(error)}), no path= is set and no "
            "file of the source's name lies under data.root; set data.root=FOLDER or "
            "data.sources.NAME.path=FILE."
        ) from None


def require_hub(dataset: str) -> None:
    """Fail at once without a network: the hub's client would retry for half a minute first."""
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
    if Path(dataset).exists() or offline or getproxies():
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    socket.getaddrinfo(host, 443)
