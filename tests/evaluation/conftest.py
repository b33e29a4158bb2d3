"""A small base, an adapter of it, and text that neither was made from."""

from pathlib import Path

import pytest

from cqlora.config.schema import ModelConfig
from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.data.held_out import HeldOutText
from cqlora.engine import LlamaEngine
from cqlora.model.tiny import build_tiny
from tests.cards import drop_card
from tests.inference.conftest import TEXTS, build_adapter

CHINESE = [
    "长江发源于青藏高原，流入东海。" * 9,
    "河流两岸住着很多人。",
    "最长的河流不一定最宽，最宽的河流也不一定最长。",
]
ENGLISH = ["The longest river is not always the widest one. " * 8, "Asia is the largest continent."]


def build_base(folder: Path, positions: int = 1024, seed: int = 0) -> Path:
    """A random base with room for the probe's examples."""
    shape = ModelConfig(
        name="tiny", path=str(folder), vocab_size=448, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions,
    )  # fmt: skip
    return drop_card(build_tiny(shape, TEXTS, CHAT_TEMPLATE, seed))


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
