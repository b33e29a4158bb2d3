"""Bases that the tests of merges share, each written once for a module."""

from pathlib import Path

import pytest

from cqlora.system import shards
from tests.weights.adapters import write_tiny_base


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with two embedding matrices."""
    return write_tiny_base(tmp_path_factory.mktemp("untied") / "base")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base whose one matrix is input and output."""
    return write_tiny_base(tmp_path_factory.mktemp("tied") / "base", tied=True)


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of rows smaller than a matrix, as on a real one."""
    monkeypatch.setattr(shards, "READ_BYTES", 5000)
