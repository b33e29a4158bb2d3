"""One sentence for damaged folders, whose readers may raise anything at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cqlora.errors import CqloraError, ModelError


@contextmanager
def described_as_damage(*folders: Path | None) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise into a sentence that names the folders.

    Raises:
        ModelError: see above.
    """
    try:
        yield
    except CqloraError:
        raise
    except Exception as error:
        named = " or ".join(str(folder) for folder in folders if folder is not None)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(
            f"a file in {named} is damaged ({reason[:200]}); fetch, convert or merge the model again."
        ) from error
