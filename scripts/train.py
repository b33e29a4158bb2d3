"""`cqlora run` with a file of choices, as the older script took one: `python scripts/train.py CONF.yaml [key=value …]`.

The file holds groups by name and keys by node, as the command line would:

    stage: sft
    model: llama_7b
    hardware: 4xa100
    stage.learning_rate: 1e-4
    lora: {rank: 64, alpha: 16}
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cqlora.errors import ConfigError
from cqlora.run import main


def translate(arguments: list[str]) -> list[str]:
    """`CONF.yaml` as overrides, then those of the command line."""
    if not arguments or not Path(arguments[0]).is_file():
        raise ConfigError(f"scripts/train.py needs a YAML file of choices, got {arguments[:1]}; give CONF.yaml.")
    document = OmegaConf.to_container(OmegaConf.load(arguments[0]))
    return [*list_overrides("", document), *arguments[1:]]


def list_overrides(prefix: str, value: Any) -> Iterator[str]:
    """`key=value` for each leaf."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from list_overrides(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, list):
        yield f"{prefix}=[{','.join(map(quote, value))}]"
    else:
        yield f"{prefix}={quote(value)}"


def quote(value: Any) -> str:
    """A value as Hydra's parser reads it back."""
    if value is None:
        return "null"
    return repr(value) if isinstance(value, str) and not value.isidentifier() else str(value)


if __name__ == "__main__":
    try:
        sys.argv[1:] = translate(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
    main()
