"""The fake GPU itself: what it counts, and what it refuses as a real one would."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.gpu.conftest import FIGURES, STARTED, pytest_terminal_summary


def test_every_wait_is_counted_and_what_a_gpu_would_refuse_is_refused(fake_gpu):
    found = fake_gpu.ask("try_the_meter")
    assert found["waits"] == [
        ["_local_scalar_dense", 1],
        ["_to_copy", 1],
        ["copy from pageable memory", 1],
        ["copy_", 1],
        ["index.Tensor", 1],
        ["nonzero", 1],
        ["synchronize", 1],
    ]
    # A size that depends on numbers, a mask, two devices in one sum.
    assert found["refused"] == [True, True, True]
    # The fake kernels let this pass: tests look at the types of products themselves.
    assert found["types"] == ["bfloat16 and float32"]
    assert found["alive"] == [512, 0]


def test_what_goes_wrong_there_is_told_here(fake_gpu):
    with pytest.raises(AssertionError, match=r"(?s)Traceback.*none_such"):
        fake_gpu.ask("measure_step", "model=none_such")


REAL = "tests.gpu.test_real_gpu"


def imports_of(module: str, found: dict[str, set[str]]) -> dict[str, set[str]]:
    """What a test module imports of this project's tests, by module, and what those do."""
    found.setdefault(module, set())
    for node in ast.walk(ast.parse(Path(ROOT, *module.split(".")).with_suffix(".py").read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tests"):
            for name in [str(node.module), *(f"{node.module}.{each.name}" for each in node.names)]:
                if name not in found and Path(ROOT, *name.split(".")).with_suffix(".py").is_file():
                    imports_of(name, found)
                found[module].add(name)
    return found


def test_the_tests_on_real_gpus_know_nothing_of_the_fake_one():
    found = imports_of(REAL, {})
    assert {"tests.gpu.step", "tests.gpu.real"} <= found.keys()
    assert not {"tests.gpu.fake_gpu", "tests.gpu.fake_step", "tests.gpu.meter", "tests.gpu.guard"} & found.keys()


def test_no_run_on_a_real_gpu_is_forked():
    """In whatever is forked from a process that has imported bitsandbytes, CUDA refuses to begin."""
    found = imports_of(REAL, {})
    used = {name for module in (REAL, "tests.gpu.real") for name in found[module] if name.startswith("tests.runs.")}
    assert used == {"tests.runs.free_port", "tests.runs.typed_run"}
    assert not {name for module in (REAL, "tests.gpu.real") for name in found[module] if "tests.commands" in name}


def report(name: str, outcome: str, longrepr: Any = None, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(nodeid=f"file.py::{name}", outcome=outcome, longrepr=longrepr, keywords=["gpu"], **more)


@pytest.mark.parametrize("figures", [{}, {"tokens": "7"}])
def test_the_block_to_paste_is_printed_though_every_test_failed_and_says_how(figures):
    crash = SimpleNamespace(reprcrash=SimpleNamespace(message="RuntimeError: no kernel image\nmore"))
    of_fake = report("fake", "passed")
    of_fake.keywords = []
    stats = {
        "passed": [of_fake], "failed": [report("runs", "failed", crash)], "error": [report("made", "failed", None)],
        "skipped": [report("two", "skipped", ("file.py", 1, "Skipped: needs 2 GPUs"))],
    }  # fmt: skip
    lines: list[str] = []
    terminal = SimpleNamespace(stats=stats, section=lines.append, write_line=lines.append)
    stash = pytest.Stash()
    stash[STARTED] = 0.0
    pytest_terminal_summary(terminal, SimpleNamespace(stash=stash))
    assert lines == []
    stash[FIGURES] = figures
    pytest_terminal_summary(terminal, SimpleNamespace(stash=stash))
    title, block = lines
    told = block.splitlines()
    assert title == "paste this into an issue" and told[0].startswith("GPUs: ") and told[1].startswith("driver ")
    assert told[2:-1] == [
        *(f"{name}: {figure}" for name, figure in figures.items()),
        "failed: runs: RuntimeError: no kernel image", "error: made", "skipped: two: needs 2 GPUs",
    ]  # fmt: skip
    assert told[-1].startswith("all of it took ")
