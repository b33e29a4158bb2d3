"""The shape of `model=auto`: what the base's own folder says, read while the configuration is composed."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from cqlora.architectures import Part, find_biases, find_head_dim, has_head_norms, require_known, ties_embeddings
from cqlora.errors import ConfigError, ModelError
from cqlora.system.documents import read_object, read_object_if_there
from cqlora.system.model_config import check_config

RESOLVER = "of_base"
_DEFAULTS = {"num_key_value_heads", "max_position_embeddings"}
"""What a kind other than llama has a default of its own for, which is asked for instead of guessed."""


def register_resolver() -> None:
    """Make `${of_base:KEY}` beside a `path` the KEY of that folder's config.json."""
    OmegaConf.register_new_resolver(RESOLVER, read_from_base, replace=True)


def read_from_base(key: str, *, _parent_: DictConfig) -> Any:
    """A key of the shape, as config.json has it or as transformers takes it where it has none.

    Raises:
        MissingMandatoryValue: there is no path.
        ConfigError: there is no such folder, or a config.json that is damaged or of a kind that is not known.
    """
    if OmegaConf.is_missing(_parent_, "path"):
        # Of a sweep over folders it is each job's own.
        raise MissingMandatoryValue("Missing mandatory value: path")
    try:
        folder = Path(str(_parent_.path)).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"model.path={_parent_.path} names nobody's folder ({error}); write it whole.") from None
    return read_shape(folder)[key]


def read_shape(folder: Path) -> dict[str, Any]:
    """Every key of ModelConfig that is about the shape; rows that an extension added are not counted.

    Raises:
        ConfigError: see `read_from_base`.
    """
    # Keys are asked for one after the other, and a folder says the same to each.
    return _read_shape(folder, _state_of(folder / "config.json"), _state_of(folder / "cqlora.json"))


@lru_cache(maxsize=8)
def _read_shape(folder: Path, *_: object) -> dict[str, Any]:
    file = folder / "config.json"
    if not os.path.lexists(file):
        raise ConfigError(
            f"model.path={folder} has no config.json; give the folder of a model in Hugging Face form, or make one "
            "with `cqlora fetch` or `cqlora convert`."
        )
    try:
        config = read_object(file)
        check_config(config, file)
        # Windows are looked at with the weights, when the length of what is read is known.
        require_known(Part.plan, config, folder, longest=1)
        card = read_object_if_there(folder / "cqlora.json")
    except ModelError as error:
        raise ConfigError(str(error)) from error
    for key in sorted(_DEFAULTS - config.keys()) if config["model_type"] != "llama" else ():
        raise ConfigError(f"{file} has no {key}; add it, as transformers does when it saves a model.")
    first = card.get("first_added_row")
    shape = {
        "vocab_size": first if type(first) is int and first > 0 else config["vocab_size"],
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": find_head_dim(config),
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "tie_word_embeddings": ties_embeddings(config),
        "biases": find_biases(config),
        "head_norms": has_head_norms(config),
    }
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return shape | {key: config[key] for key in same}


def _state_of(file: Path) -> tuple[int, ...]:
    """What tells a file from itself before a change; nothing of one that is not there."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
