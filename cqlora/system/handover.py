"""What a worker process and the one that started it hand each other by the environment."""

import os
from pathlib import Path

STORE_SOCKET = "CQLORA_STORE_SOCKET"
"""Environment variable with the descriptor of the socket on which rank 0 hears the others."""
FAILURE_FILE = "CQLORA_FAILURE_FILE"
"""Environment variable with the file in which a worker says why it fails."""


def write_failure(text: str) -> bool:
    """Say why this worker fails to the process that started it; whether there is one."""
    file = os.environ.get(FAILURE_FILE)
    if file is None:
        return False
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError:
        # The disk may be full, which is then what is to be told.
        Path(file).unlink(missing_ok=True)
        return False
    return True
