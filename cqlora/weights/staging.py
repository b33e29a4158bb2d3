"""A folder that appears whole or not at all: staged beside its place, fsynced, renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cqlora.disk import sync, sync_tree
from cqlora.errors import ModelError


@contextmanager
def staged_folder(output_dir: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `output_dir` when the block ends without an exception.

    What a killed predecessor left at the staging place is removed first. The staging folder's name keeps it
    from being taken for a model: it is hidden and holds no config.json until the block writes one.

    Raises:
        ModelError: `output_dir` is already there.
    """
    refuse_existing(output_dir)
    staging = output_dir.parent / f".{output_dir.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        sync_tree(staging)
        refuse_existing(output_dir)
        if output_dir.is_dir():
            output_dir.rmdir()
        staging.rename(output_dir)
        sync(output_dir.parent)
    except OSError as error:
        raise ModelError(f"{output_dir} could not be written ({error.strerror or error}); nothing was left.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_existing(output_dir: Path) -> None:
    """Raise ModelError where `output_dir` holds something already."""
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise ModelError(f"output_dir={output_dir} is already there; choose another folder or remove it first.")
