"""Opening a run's base, which is built on the spot where the model is a random one and its folder is not there."""

from pathlib import Path

from cqlora.base import Base, read_base
from cqlora.config import ModelConfig


def open_base(model: ModelConfig) -> Base:
    """The base's own description; torch is imported only to build one."""
    if model.random_init and not Path(model.path).exists():
        from cqlora.data.chat import CHAT_TEMPLATE
        from cqlora.data.sources import SAMPLE_DIR
        from cqlora.model.tiny import build_tiny, read_sample_texts

        build_tiny(model, read_sample_texts(SAMPLE_DIR), CHAT_TEMPLATE)
    return read_base(model.path)
