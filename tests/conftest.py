"""What every test starts from: few threads, no network, no tracker, no folders shared with the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HYDRA_FULL_ERROR"] = "1"
for variable in ("WANDB_API_KEY", "CQLORA_DATA", "HF_TOKEN"):
    os.environ.pop(variable, None)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run commands in; the tiny model and the token caches that they make are shared."""
    return tmp_path_factory.mktemp("workspace")


def run_verb(
    workspace: Path, verb: str, *arguments: str, expect: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m cqlora.VERB …` as a user would, and check its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", f"cqlora.{verb}", *arguments],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
