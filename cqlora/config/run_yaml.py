"""run.yaml: the settled configuration of a run, which workers and later commands read instead of composing again."""

from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cqlora.config.schema import DataConfig, PretrainConfig, RunConfig, SftConfig
from cqlora.errors import ConfigError
from cqlora.system.refusals import described_as_sentence

RUN_FILE = "run.yaml"
STAGED_FILE = ".run.yaml.staging"
"""What workers read of a run that nobody has accepted yet."""
LOCK_FILE = ".lock"
"""Locked for as long as a run is going on in its folder."""
_STAGES: dict[str, type] = {"pretrain": PretrainConfig, "sft": SftConfig}

_DAMAGES = (ConfigError, OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError, KeyError, AttributeError,
            RecursionError)  # fmt: skip
"""What reading a file that something has changed may raise."""


def write_run_yaml(config: RunConfig, folder: Path) -> Path:
    """Write `folder`/run.yaml with every value resolved, whole or not at all; return its path."""
    file = folder / RUN_FILE
    with described_as_sentence(file):
        return stage_config(config, folder).replace(file)


def stage_config(config: RunConfig, folder: Path) -> Path:
    """Write the configuration beside run.yaml, which stays as it is until the run is accepted; return its path."""
    file = folder / STAGED_FILE
    with described_as_sentence(file):
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(config), file)
    return file


def load_run_yaml(file: Path) -> RunConfig:
    """Read a run.yaml back into the typed configuration.

    Raises:
        ConfigError: the file is not there, or damaged, or of another version of the schemas.
    """
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; give the folder of a run that cqlora wrote.")
    try:
        loaded = load_recorded(file)
        schema = OmegaConf.structured(RunConfig)
        schema.stage = _STAGES[loaded.stage.name]
        schema.data = DataConfig
        if loaded.stage.name == "sft" and "template" not in loaded.stage:
            # An older cqlora had no other.
            loaded.stage.template = "chatml"
        config: Any = OmegaConf.to_object(OmegaConf.merge(schema, loaded))
    except _DAMAGES as error:
        raise ConfigError(
            f"{file} is damaged or of another version ({describe_reason(error)}); put back the file that the run wrote."
        ) from error
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{file} is no configuration of a run; give the folder of a run that cqlora wrote.")
    return config


def load_recorded(file: Path) -> Any:
    """What cqlora wrote into a YAML file.

    Raises:
        ConfigError: it has an alias, which cqlora writes none of: nine lines of them stand for more than memory holds.
        YAMLError, OSError, ValueError: as OmegaConf.load.
    """
    events = yaml.parse(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if any(isinstance(event, yaml.AliasEvent) for event in events):
        raise ConfigError("it has YAML aliases")
    return OmegaConf.load(file)


def describe_reason(error: Exception) -> str:
    """What is wrong with a run.yaml, in a few words."""
    # Only here: it asks Hydra for its own errors, which workers have no need of.
    from cqlora.config.diagnosis import explain_composition

    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return explain_composition(error, RunConfig, []).partition(";")[0].rstrip(".")
    if isinstance(error, ConfigError):
        return str(error).rstrip(".")
    if isinstance(error, YAMLError):
        mark = getattr(error, "problem_mark", None)
        return f"no YAML{f' from line {mark.line + 1} on' if mark else ''}"
    return "it lacks keys, or holds what is none" if not isinstance(error, UnicodeError) else "no UTF-8 text"


def describe_config(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain nested values, for trackers and comparisons."""
    return {key: to_plain(value) for key, value in asdict(config).items()}


def to_plain(value: Any) -> Any:
    """A value with the names of choices in their place, as YAML has them."""
    if isinstance(value, dict):
        return {key: to_plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [to_plain(each) for each in value]
    return value.name if isinstance(value, Enum) else value


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def list_changes(config: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose value is not the default of their schema; those without a default are not among them."""
    changed: list[str] = []
    for declared in fields(config):
        value, key = getattr(config, declared.name), f"{prefix}{declared.name}"
        if is_dataclass(value):
            changed += list_changes(value, f"{key}.")
            continue
        default = declared.default_factory() if declared.default_factory is not NO_DEFAULT else declared.default
        if default not in (NO_DEFAULT, MISSING) and value != default:
            changed.append(key)
    return changed
