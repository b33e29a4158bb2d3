"""Whether torch can use the GPUs that the driver shows."""

import re

import torch

from cqlora.errors import ConfigError
from cqlora.system.machine import read_driver_version


def require_cuda(asked: str, instead: str) -> None:
    """Raise ConfigError where torch sees no GPU, though `asked` (a setting) wants one; `instead` does without."""
    if torch.cuda.is_available() and torch.cuda.device_count():
        return
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for processors alone"
    driver = read_driver_version()
    raise ConfigError(
        f"{asked}, and torch {torch.__version__}, {built}, sees no GPU"
        f"{f' with the driver {driver}' if driver else ''}; install the torch that fits it, or use {instead}."
    )


def require_kernels(gpu: torch.device, instead: str) -> None:
    """Raise ConfigError where torch was built without code for a GPU, which would end its first operation.

    Code for one GPU runs on others of its major version from its minor one on; PTX, for none yet, on all later ones.
    """
    own, built = torch.cuda.get_device_capability(gpu), torch.cuda.get_arch_list()
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(built)):
        code = int(major), int(minor)
        if code <= own and (kind == "compute" or code[0] == own[0]):
            return
    if built:
        raise ConfigError(
            f"torch {torch.__version__} was built for {', '.join(built)}, and {torch.cuda.get_device_name(gpu)} is "
            f"sm_{own[0]}{own[1]}; install a torch built for it (https://pytorch.org/get-started/locally), or use "
            f"{instead}."
        )
