"""The tables of docs/hardware.md are the planner's own."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables() -> list[str]:
    """What benchmarks/plan_table.py prints."""
    spec = importlib.util.spec_from_file_location("plan_table", ROOT / "benchmarks" / "plan_table.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return ["\n".join(module.machine_table()), "\n".join(module.length_table())]


@pytest.mark.parametrize("name", ["hardware.md", "hardware.zh-CN.md"])
def test_tables_are_up_to_date(tables: list[str], name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    for table in tables:
        assert table in page, "run `python benchmarks/plan_table.py` and paste its tables"
