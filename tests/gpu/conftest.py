"""GPUs for tests: such that are not there, with `cases.py` to ask what programs do on them; and real ones."""

from collections.abc import Iterator

import pytest

from tests.gpu.guard import why_no_fake_gpu
from tests.gpu.server import Server

FIGURES = pytest.StashKey[dict[str, str]]()


@pytest.fixture(scope="session")
def fake_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of answers, started once for each test process."""
    reason = why_no_fake_gpu()
    if reason is not None:
        pytest.skip(reason)
    server = Server(tmp_path_factory.mktemp("fake-gpu"))
    yield server
    server.close()


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> dict[str, str]:
    """What is told at the end of the tests on real GPUs, in one block."""
    return request.config.stash.setdefault(FIGURES, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the block, where any test has put a figure into it."""
    told = config.stash.get(FIGURES, {})
    if not told:
        return
    from tests.gpu.real import describe

    outcomes = {
        outcome: [report.nodeid.partition("::")[2] for report in terminalreporter.stats.get(outcome, [])]
        for outcome in ("passed", "failed", "skipped")
    }
    terminalreporter.section("paste this into an issue")
    terminalreporter.write_line(describe(told, outcomes))
