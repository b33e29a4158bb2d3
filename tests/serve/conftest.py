"""A tiny model, for the tests that go from the socket to the weights and back."""

from pathlib import Path

import pytest

from cqlora.config.schema import ModelConfig
from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.model.tiny import build_tiny

TEXTS = [
    "The model answers over HTTP. 模型通过网络回答问题。",
    "user system assistant 用户 助手",
    "streaming 流式输出",
] * 4


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of 512 tokens and 256 positions."""
    shape = ModelConfig(
        name="tiny",
        path=str(tmp_path_factory.mktemp("serve") / "tiny"),
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return build_tiny(shape, TEXTS, CHAT_TEMPLATE)
