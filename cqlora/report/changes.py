"""What of a run's configuration was chosen, against what its groups hold by default."""

from functools import cache
from typing import Any

from omegaconf import open_dict

from cqlora.config.composition import compose_alone
from cqlora.config.diagnosis import to_schema
from cqlora.config.run_yaml import describe_config, flatten
from cqlora.config.schema import SETTLED_KEYS, RunConfig
from cqlora.errors import ConfigError

GROUPS = ("model", "data", "stage", "hardware")
_MEASURED = {f"hardware.{name}" for name in ("host_memory_gib", "gpu_memory_gib", "gpus_per_node")}
"""What a run reads of its machine where it is 0."""


def describe_settings(config: RunConfig) -> list[dict[str, Any]]:
    """Every key of a run with its value, its default in the groups that the run names, and whether it was chosen.

    Keys that were left to `auto`, or to what the machine has, are not counted as chosen. Groups of a user's
    own, which are not to be found from here, have no defaults: then `default` is absent.
    """
    values = flatten(describe_config(config))
    defaults = find_defaults(tuple(f"{group}={getattr(config, group).name}" for group in GROUPS))
    settings = []
    for key, value in values.items():
        setting: dict[str, Any] = {"key": key, "value": value}
        if defaults is not None and key in defaults:
            settled = (key in SETTLED_KEYS and defaults[key] == "auto") or (key in _MEASURED and not defaults[key])
            setting |= {"default": defaults[key], "changed": value != defaults[key] and not settled}
        settings.append(setting)
    return settings


@cache
def find_defaults(choices: tuple[str, ...]) -> dict[str, Any] | None:
    """The flat configuration that groups compose to without another override; None where they are not ours."""
    try:
        with compose_alone("config", RunConfig, list(choices)) as composed:
            with open_dict(composed):
                del composed["hydra"]
            return flatten(describe_config(to_schema(composed, RunConfig)))
    except ConfigError:
        return None
