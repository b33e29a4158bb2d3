"""A worker's rank among the workers that torchrun or srun started, read from the environment."""

import os
import re
import socket
from collections.abc import Mapping

import psutil

from cqlora.config.schema import HardwareConfig
from cqlora.errors import ConfigError

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_WORKERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_FIRST_PORT, _PORTS = 10_000, 20_000
"""Below what systems hand out by themselves (32768 on Linux), above what needs rights."""


def find_rank_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """torchrun's variables for this process; None where nobody has started it as one of several workers.

    Raises:
        ConfigError: one that describes workers is set and others that belong to it are not, or it cannot be.
    """
    alone = environment.get("WORLD_SIZE", "1") == "1" and "LOCAL_RANK" not in environment
    if alone or "RANK" not in environment or "WORLD_SIZE" not in environment:
        # Clouds describe their nodes by RANK and WORLD_SIZE; of one node they say nothing of workers.
        found = find_slurm_rank(environment)
        if found is not None or alone:
            return found
    missing = [name for name in _TORCHRUN if name not in environment]
    if missing:
        given = " and ".join(name for name in _OF_WORKERS if name in environment)
        raise ConfigError(
            f"the environment has {given} but no {', '.join(missing)}; start with torchrun or srun, or unset {given}."
        )
    found = {name: environment[name] for name in _TORCHRUN}
    _check_numbers(found)
    return found


def _check_numbers(environment: Mapping[str, str]) -> None:
    """Raise ConfigError where a rank environment has what is no number, or a rank that is none of its workers'."""
    for name in (name for name in _TORCHRUN if name != "MASTER_ADDR"):
        value = environment[name]
        if not re.fullmatch("[0-9]{1,9}", value):
            raise ConfigError(f"the environment has {name}={value}, which is no number; start with torchrun or srun.")
    rank, workers = environment["RANK"], environment["WORLD_SIZE"]
    if int(rank) >= int(workers):
        raise ConfigError(
            f"the environment has RANK={rank} of WORLD_SIZE={workers}; ranks count from 0; start with torchrun or srun."
        )


def find_slurm_rank(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The rank environment of a task that srun started beside others; a batch script's own process is none."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if tasks == "1" or "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    nodes = nodes or environment.get("SLURM_JOB_NODELIST", "localhost")
    # Steps of one job, and jobs that share a node, get ports of their own.
    step = int(environment["SLURM_STEP_ID"]) if environment["SLURM_STEP_ID"].isdigit() else 0
    port = _FIRST_PORT + (int(environment.get("SLURM_JOB_ID", "0")) * 7 + step) % _PORTS
    found = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_node(nodes),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }
    _check_numbers(found)
    return found


def first_node(nodes: str) -> str:
    """The first host of a Slurm list such as `gpu[03-05,9],login`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    assert first is not None
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def take_rank_environment(environment: Mapping[str, str], hardware: HardwareConfig) -> None:
    """Put a rank environment into this process's own, where torch looks for it.

    Raises:
        ConfigError: another number of workers was started than the configuration has.
    """
    if int(environment["WORLD_SIZE"]) != hardware.world_size:
        raise ConfigError(
            f"hardware={hardware.name} has {hardware.world_size} workers and {environment['WORLD_SIZE']} were started; "
            f"start {hardware.world_size}, or choose the group of your machine."
        )
    os.environ.update(environment)
    if hardware.nodes > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = find_interface(environment["MASTER_ADDR"])
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface


def find_interface(host: str) -> str | None:
    """The network interface by which this machine reaches a host, itself included; None where that is loopback alone.

    gloo looks up this machine's own name instead, which many systems have at 127.0.1.1, where no other node finds it.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Sends nothing: the system looks up the route.
            probe.connect((host, 9))
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127."):
        return None
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if own in {each.address for each in addresses}), None)
