"""Rows of a Hugging Face dataset, streamed."""

import os
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from cqlora.data.records import RawRow
from cqlora.data.sources.files import first_line
from cqlora.data.sources.location import MODELSCOPE, Location
from cqlora.errors import DataError

HUB_SECONDS = 6.0
"""In which the hub must answer, however long its name takes to resolve."""

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
    require_hub(location)
    try:
        streams = datasets.load_dataset(location.dataset, location.subset or None, streaming=True)
        names = [name for name in _SPLITS if name in streams]
        for name in names:
            split = _SPLITS[name] if len(names) > 1 else None
            for number, row in enumerate(streams[name], start=1):
                yield RawRow(f"{location.dataset}/{name}", number, row, split)
    except Exception as error:  # noqa: BLE001 - the client's, its own client's, and what answers of no hub lead to
        raise nowhere(location, first_line(error) or type(error).__name__) from None


def require_hub(location: Location) -> None:
    """Fail soon without a network: the hub's client would try again for minutes.

    Raises:
        DataError: nothing answers within HUB_SECONDS.
    """
    of_huggingface = not location.dataset.startswith(MODELSCOPE)
    offline = of_huggingface and (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE"))
    if not location.dataset or Path(location.dataset).exists() or offline:
        return
    found = [f"no answer in {HUB_SECONDS:g} s"]

    def ask() -> None:
        found[0] = why_unreachable(hub_of(location))

    # Resolving a name has no time limit of its own, so another thread waits for it.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    if found[0]:
        raise nowhere(location, found[0])


def hub_of(location: Location) -> str:
    """Address of the hub that the dataset lies on; the environment may name a mirror or another."""
    if location.dataset.startswith(MODELSCOPE):
        return os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def why_unreachable(endpoint: str) -> str:
    """Why nothing answers at an address, through the proxies that the environment names; empty where something does."""
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=HUB_SECONDS).close()
    except HTTPError as error:
        return first_line(error) if error.code >= 500 else ""
    except (OSError, ValueError) as error:
        # The hub's client brings certificates of its own, so whom to trust is for it to say.
        reason = error.reason if isinstance(error, URLError) and isinstance(error.reason, OSError) else error
        return "" if isinstance(reason, ssl.SSLError) else first_line(reason)
    return ""


def nowhere(location: Location, why: str) -> DataError:
    """The error that names the three places."""
    name, variable = location.name, "MODELSCOPE" if location.dataset.startswith(MODELSCOPE) else "HF"
    return DataError(
        f"source {name} is nowhere to be found: data.sources.{name}.path is empty, no file or folder of its name lies "
        f"under data.root, and data.sources.{name}.dataset={location.dataset} cannot be streamed ({why}); set "
        f"data.sources.{name}.path=FILE or data.root=FOLDER, or a mirror by {variable}_ENDPOINT in the environment."
    )
