"""Configurations to plan, composed as a user would."""

from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cqlora.config.schema import CONFIG_DIR, ModelConfig, RunConfig, register_schemas
from cqlora.launch.settle import look_ahead, settle


def compose_run(*overrides: str) -> RunConfig:
    """The settled configuration of `cqlora plan OVERRIDES`."""
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        config: Any = OmegaConf.to_object(compose("config", list(overrides)))
    assert isinstance(config, RunConfig)
    return settle(config, look_ahead(config))


def small_model(**changes: Any) -> ModelConfig:
    """A shape whose real counterpart runs in a moment."""
    shape: dict[str, Any] = {
        "name": "small",
        "path": "nowhere",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return ModelConfig(**{**shape, **changes})
