"""GPUs that are not there, for tests that ask `cases.py` what programs do on them."""

from collections.abc import Iterator

import pytest

from tests.gpu.guard import why_no_fake_gpu
from tests.gpu.server import Server


@pytest.fixture(scope="session")
def fake_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of answers, started once for each test process."""
    reason = why_no_fake_gpu()
    if reason is not None:
        pytest.skip(reason)
    server = Server(tmp_path_factory.mktemp("fake-gpu"))
    yield server
    server.close()
