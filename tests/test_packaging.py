"""The groups are found from a checkout, an editable install and an installed wheel, and the sample ships."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from cqlora import __version__
from tests.conftest import ROOT, run_verb

EXPECTED = {file.relative_to(ROOT).as_posix() for file in (ROOT / "configs").rglob("*.yaml")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built by the backend that pyproject.toml names."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_who_cites_the_project_cites_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"


def where_configs_are_found(python_path: Path, cwd: Path) -> Path:
    code = "from cqlora.config.schema import CONFIG_DIR; print(CONFIG_DIR.resolve())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={"PYTHONPATH": str(python_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_a_checkout_finds_the_groups_at_its_root(tmp_path):
    assert where_configs_are_found(ROOT, tmp_path) == ROOT / "configs"


def test_a_wheel_holds_every_group_file_the_sample_and_the_page(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"cqlora/{name}" for name in EXPECTED} <= names
    assert {f"cqlora/data/sample/sample_zh/{split}.jsonl" for split in ("train", "val", "test")} <= names
    pages = [file for room in ("serve", "report") for file in (ROOT / "cqlora" / room / "page").rglob("*")]
    assert {file.relative_to(ROOT).as_posix() for file in pages if file.is_file()} <= names
    assert {"cqlora/serve/page/vendor/purify.LICENSE.txt", "cqlora/report/page/vendor/echarts.LICENSE.txt"} <= names
    assert "cqlora/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "configs/"))]


def test_an_installed_wheel_composes_from_its_own_groups(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert where_configs_are_found(site, tmp_path) == site / "cqlora" / "configs"
    done = subprocess.run(
        [sys.executable, "-m", "cqlora.run", "stage=pretrain", "model=llama_65b", "--cfg", "job"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert "hidden_size: 8192" in done.stdout, done.stderr


def test_an_editable_install_finds_the_groups_of_the_checkout(tmp_path):
    """An editable wheel puts the checkout on the path; nothing of it is copied, so nothing of it goes stale."""
    code = f"import hatchling.build as b; print(b.build_editable({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    archive = zipfile.ZipFile(tmp_path / done.stdout.strip().splitlines()[-1])
    paths = [name for name in archive.namelist() if name.endswith(".pth")]
    assert len(paths) == 1
    assert archive.read(paths[0]).decode().strip() == str(ROOT)
    assert not [name for name in archive.namelist() if name.endswith(".yaml")]


def test_the_module_and_the_console_script_are_one_program(workspace):
    by_module = run_verb(workspace, "run", "stage=sft", "--cfg", "job").stdout
    by_script = run_verb(workspace, "cli", "run", "stage=sft", "--cfg", "job").stdout
    assert by_module == by_script
