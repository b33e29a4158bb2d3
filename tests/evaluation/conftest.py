"""A small base, an adapter of it, and text that neither was made from."""

from pathlib import Path

import pytest

from cqlora.data.held_out import HeldOutText
from cqlora.engine import LlamaEngine
from tests.inference.conftest import build_adapter, build_base

CHINESE = [
    "长江发源于青藏高原，流入东海。" * 9,
    "河流两岸住着很多人。",
    "最长的河流不一定最宽，最宽的河流也不一定最长。",
]
ENGLISH = ["The longest river is not always the widest one. " * 8, "Asia is the largest continent."]


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return build_base(tmp_path_factory.mktemp("evaluation") / "base")


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory) -> Path:
    return build_adapter(base, tmp_path_factory.mktemp("evaluation") / "run" / "adapter")


@pytest.fixture(scope="session")
def engine(base) -> LlamaEngine:
    return LlamaEngine(base, "", use_lora=False, dtype="float32")


@pytest.fixture(scope="session")
def chinese() -> HeldOutText:
    return HeldOutText("river", "zh", CHINESE)
