"""Opening a run's base, which is built on the spot where it is the random one of `model=tiny` and not there yet."""

import logging
from pathlib import Path

from cqlora.base import Base, read_base
from cqlora.config.schema import ModelConfig
from cqlora.errors import ModelError

logger = logging.getLogger(__name__)

RANDOM_BASE = Path("models/tiny")
"""The one folder, here or under another, where random weights are made: any other name may be a typing mistake."""


def is_to_be_built(model: ModelConfig) -> bool:
    """Whether the base is a random one that is not there yet.

    Raises:
        ModelError: random weights are asked for in another folder.
    """
    folder = Path(model.path)
    if not model.random_init or folder.exists():
        return False
    if folder.parts[-2:] != RANDOM_BASE.parts:
        raise ModelError(
            f"model.path={model.path} does not exist, and model={model.name} makes random weights at {RANDOM_BASE} "
            "only; give the folder of a model that is there, with its model group, or leave model.path out."
        )
    return True


def open_base(model: ModelConfig) -> Base:
    """The base's own description; torch is imported only to build one.

    Raises:
        ModelError: it is missing or unfit.
    """
    if is_to_be_built(model):
        from cqlora.data.chat import CHAT_TEMPLATE
        from cqlora.data.sources import SAMPLE_DIR
        from cqlora.model.tiny import build_tiny, read_sample_texts

        build_tiny(model, read_sample_texts(SAMPLE_DIR), CHAT_TEMPLATE)
    base = read_base(model.path)
    if model.random_init and base.path.parts[-2:] == RANDOM_BASE.parts:
        logger.info("base %s: random weights, which have learned no language; good for trying things out", base.path)
    return base
