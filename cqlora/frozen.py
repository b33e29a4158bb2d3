"""run.yaml: the frozen configuration of a run, which workers and later commands read instead of composing again."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cqlora.config import DataConfig, PretrainConfig, RunConfig, SftConfig
from cqlora.errors import ConfigError

RUN_FILE = "run.yaml"
STAGED_FILE = ".run.yaml.staging"
"""What workers read of a run that nobody has accepted yet."""
_STAGES: dict[str, type] = {"pretrain": PretrainConfig, "sft": SftConfig}


def freeze_config(config: RunConfig, folder: Path) -> Path:
    """Write `folder`/run.yaml with every value resolved, whole or not at all; return its path."""
    return stage_config(config, folder).replace(folder / RUN_FILE)


def stage_config(config: RunConfig, folder: Path) -> Path:
    """Write the configuration beside run.yaml, which stays as it is until the run is accepted; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / STAGED_FILE
    OmegaConf.save(OmegaConf.structured(config), file)
    return file


def load_frozen(file: Path) -> RunConfig:
    """Read a run.yaml back into the typed configuration.

    Raises:
        ConfigError: the file is not there.
    """
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; give the folder of a run that cqlora wrote.")
    loaded: Any = OmegaConf.load(file)
    schema = OmegaConf.structured(RunConfig)
    schema.stage = _STAGES[loaded.stage.name]
    schema.data = DataConfig
    config: Any = OmegaConf.to_object(OmegaConf.merge(schema, loaded))
    assert isinstance(config, RunConfig), type(config)
    return config


def describe_config(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain nested values, for trackers and comparisons."""
    container: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return dict(container)
