"""GPUs for tests: such that are not there, with `cases.py` to ask what programs do on them; and real ones."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.gpu.guard import why_no_fake_gpu
from tests.gpu.server import Server

FIGURES = pytest.StashKey[dict[str, str]]()
STARTED = pytest.StashKey[float]()
OUTCOMES = ("passed", "failed", "error", "skipped")


def pytest_configure(config: pytest.Config) -> None:
    """Note when it began."""
    config.stash[STARTED] = time.monotonic()


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
    """Print the block, where any of the tests on real GPUs has begun, however it ended."""
    told = config.stash.get(FIGURES, None)
    if told is None:
        return
    from tests.gpu.real import describe

    outcomes = {
        name: [tell(each) for each in terminalreporter.stats.get(name, []) if "gpu" in each.keywords]
        for name in OUTCOMES
    }
    terminalreporter.section("paste this into an issue")
    terminalreporter.write_line(describe(told, outcomes, time.monotonic() - config.stash[STARTED]))


def tell(report: Any) -> str:
    """A test's name, and where it did not pass the first line of why."""
    name = report.nodeid.partition("::")[2]
    if report.outcome == "skipped":
        return f"{name}: {report.longrepr[2].removeprefix('Skipped: ')}"
    crash = getattr(report.longrepr, "reprcrash", None)
    return f"{name}: {crash.message.splitlines()[0]}" if crash and crash.message else name
