"""What every test starts from: few threads, no network, no tracker, no folders shared with the checkout.

Tests may run in several processes at once (`make test`). Fixtures of a session are made in each; what takes long to
make is shared through the workspace (`runs.build_once`), which is one for all.
"""

import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import run_command

ROOT = Path(__file__).parent.parent
Done = subprocess.CompletedProcess[str]
HANG_SECONDS = 3600
"""After this long something hangs. No test may depend on being quicker: other programs may have most of the machine."""

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HYDRA_FULL_ERROR"] = "1"
if os.environ.get("CQLORA_GPU_TESTS") != "real":
    # What `auto` comes to is written down for processors, and no process that is forked could use a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
REAL_DATA = os.environ.get("CQLORA_DATA", "")
"""Folder of real sources for the tests that ask for it by this name; no other sees it."""
for variable in ("WANDB_API_KEY", "CQLORA_DATA", "HF_TOKEN"):
    os.environ.pop(variable, None)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run commands in; the tiny model and the token caches that they make are shared."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (shared / "workspace").mkdir(exist_ok=True)
    return shared / "workspace"


PROCESSOR_TESTS = (
    "inference/",
    "model/",
    "serve/test_model.py",
    "system/test_processor.py",
    "test_chat.py",
    "test_engine.py",
    "weights/test_merge.py",
    "weights/test_nf4.py",
)
"""Tests whose code chooses by the processor: `make test-processors` runs them as on others."""

SLOW_FIXTURES = {"workspace", "uninterrupted", "work", "served_page", "fake_gpu"}
SLOW_MODULES = (
    "test_processes",
    "test_packaging",
    "test_page",
    "test_cluster",
    "test_chat",
    "test_flips",
    "test_full_disks",
    "test_launch",
    "test_run",
    "test_python_page",
    "test_sweeps",
    "test_wandb_files",
    "test_recipe",
    "test_recipes",
)
"""What starts programs or trains; `make test-fast` leaves it out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by where they lie and what they need, so that new ones need no thought."""
    for item in items:
        path = item.path.relative_to(ROOT / "tests")
        if path.as_posix().startswith(PROCESSOR_TESTS):
            item.add_marker(pytest.mark.processor)
        if path.stem in SLOW_MODULES or SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Let no search for garbage go through what imports and collecting have made: a seventh of the time of a test."""
    gc.freeze()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each core that may be used; each takes half a gigabyte and seconds of imports."""
    return min(len(os.sched_getaffinity(0)), 8)


@pytest.fixture(scope="session", autouse=True)
def _hide_features_from_bitsandbytes() -> None:
    """It asks the processor itself, in eval mode; where features are hidden from us they are hidden from it."""
    if os.environ.get("CQLORA_CPU_FEATURES", "all") == "all":
        return
    import bitsandbytes.nn.modules

    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


def run_verb(workspace: Path, verb: str, *arguments: str, expect: int = 0, **environment: str) -> Done:
    """Run `python -m cqlora.VERB …` as a user would, and check its exit code."""
    return run_python(workspace, "-m", f"cqlora.{verb}", *arguments, expect=expect, **environment)


def run_python(folder: Path, *arguments: str | Path, expect: int = 0, **environment: str) -> Done:
    """Run `python ARGUMENTS…` in a folder, forked (`tests.commands`), and check its exit code."""
    command = [sys.executable, *map(str, arguments)]
    done = run_command(command, folder, {**os.environ, "PYTHONPATH": str(ROOT), **environment}, HANG_SECONDS)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def call_verb(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`run_verb` in this process, where nothing heavy is loaded; a command of its own imports for a second."""

    def call(folder: Path, verb: str, *arguments: str, expect: int = 0) -> Done:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [f"cqlora {verb}", *arguments])
        module = importlib.import_module(f"cqlora.{verb}")
        program = importlib.import_module(f"cqlora.{verb}.__main__") if hasattr(module, "__path__") else module
        with pytest.raises(SystemExit) as ended:
            program.main()
        printed, code = capfd.readouterr(), int(ended.value.code or 0)
        assert code == expect, f"exit code {code}\n{printed.out}\n{printed.err}"
        return subprocess.CompletedProcess(sys.argv, code, printed.out, printed.err)

    return call
