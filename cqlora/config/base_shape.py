"""The shape of `model=auto`: what the base's own folder says, read while the configuration is composed."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cqlora.architectures import find_head_dim
from cqlora.errors import ConfigError, ModelError
from cqlora.system.documents import read_object, read_object_if_there
from cqlora.system.model_config import check_config

RESOLVER = "of_base"


def register_resolver() -> None:
    """Make `${of_base:KEY}` beside a `path` the KEY of that folder's config.json."""
    OmegaConf.register_new_resolver(RESOLVER, read_from_base, replace=True)


def read_from_base(key: str, *, _parent_: DictConfig) -> Any:
    """A key of the shape, as config.json has it or as transformers takes it where it has none.

    Raises:
        ConfigError: there is no path, no such folder, or a config.json that is damaged or of no text model.
    """
    if OmegaConf.is_missing(_parent_, "path"):
        raise ConfigError("model=auto takes its shape from a folder; add model.path=FOLDER, one in Hugging Face form.")
    return read_shape(Path(str(_parent_.path)).expanduser())[key]


def read_shape(folder: Path) -> dict[str, Any]:
    """Every key of ModelConfig that is about the shape; rows that an extension added are not counted.

    Raises:
        ConfigError: see `read_from_base`.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"model.path={folder} has no config.json; give the folder of a model in Hugging Face form, or make one "
            "with `cqlora fetch` or `cqlora convert`."
        )
    try:
        config = read_object(file)
        check_config(config, file)
        card = read_object_if_there(folder / "cqlora.json")
    except ModelError as error:
        raise ConfigError(str(error)) from error
    first = card.get("first_added_row")
    shape = {
        "vocab_size": first if type(first) is int and first > 0 else config["vocab_size"],
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": find_head_dim(config),
        "max_position_embeddings": config.get("max_position_embeddings") or 2048,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return shape | {key: config[key] for key in same}
