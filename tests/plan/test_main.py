"""The verb `plan` as a user types it."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, run_verb

BASE = "experiment=chinese_llama_65b_base"


def test_a_run_that_fits_exits_with_0_and_shows_its_parts_within_100_columns(workspace: Path) -> None:
    done = run_verb(workspace, "plan", BASE, "hardware=4xa100")
    assert "fits: takes 59." in done.stdout
    for part in (
        "weights",
        "embeddings",
        "adapter",
        "optimizer states",
        "activations",
        "context",
        "Host memory",
    ):
        assert part in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


def test_a_run_that_does_not_fit_exits_with_3_and_says_what_would(workspace: Path) -> None:
    done = run_verb(workspace, "plan", BASE, "hardware=1x4090", expect=3)
    assert "does not fit: needs" in done.stdout
    assert "hardware=2x4090 hardware.cpu_offload=true" in done.stdout
    assert "hardware=1xa100" in done.stdout


def test_suggest_lists_layouts(workspace: Path) -> None:
    done = run_verb(workspace, "plan", BASE, "hardware=4xa100", "plan=suggest")
    assert "Fastest layouts that fit hardware=4xa100" in done.stdout


def test_suggest_finds_a_layout_where_the_one_asked_for_does_not_fit(workspace: Path) -> None:
    run_verb(workspace, "plan", BASE, "hardware=2x4090", expect=3)
    done = run_verb(workspace, "plan", BASE, "hardware=2x4090", "plan=suggest")
    assert "hardware.cpu_offload=true" in done.stdout


def test_a_plan_is_light_work(workspace: Path) -> None:
    """Counted, not timed: the calls of our own functions, and the modules that are there at the end."""
    code = (
        "import sys\n"
        "import cqlora\n"
        "calls, package = 0, cqlora.__path__[0]\n"
        "def count(frame, event, argument):\n"
        "    global calls\n"
        "    calls += event == 'call' and frame.f_code.co_filename.startswith(package)\n"
        "from cqlora.plan.__main__ import main\n"
        "sys.setprofile(count)\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.setprofile(None)\n"
        "print(calls, len(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, BASE, "hardware=1x4090"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    calls, modules = map(int, done.stdout.splitlines()[-1].split())
    # 160,000 calls for the layouts that would fit, a tenth of a second's; torch alone brings over a thousand modules.
    assert 1_000 < calls < 500_000, calls
    assert 100 < modules < 1_000, modules


def test_planning_loads_neither_torch_nor_transformers(workspace: Path) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['plan', 'stage=pretrain', 'hardware=4xa100']\n"
        "from cqlora.plan.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'wandb', 'peft', 'numpy'} & set(sys.modules) or 'light')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "light"


def test_a_mistyped_key_is_named(workspace: Path) -> None:
    done = run_verb(workspace, "plan", "stage=pretrain", "plan=sugest", expect=2)
    assert "did you mean plan=suggest?" in done.stderr


def test_what_bfloat16_keeps_on_a_processor_beyond_the_plan_is_said(workspace: Path) -> None:
    for precision, told in (("bfloat16", True), ("float32", False)):
        done = run_verb(workspace, "plan", "stage=pretrain", "hardware=cpu", f"hardware.precision={precision}")
        assert ("Not counted: code that oneDNN generates for bfloat16" in done.stdout) is told
