"""A worker's rank as torchrun and srun put it into the environment."""

import os
import socket
from types import SimpleNamespace

import psutil
import pytest

from cqlora.config.choices import Strategy
from cqlora.config.schema import HardwareConfig
from cqlora.errors import ConfigError
from cqlora.launch.cluster import find_interface, find_rank_environment, first_node, take_rank_environment

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_NODELIST": "gpu[03-04]",
}


def test_torchruns_place_is_taken_as_it_is():
    assert find_rank_environment({**TORCHRUN, **SRUN, "HOME": "/"}) == TORCHRUN


def test_half_of_torchruns_variables_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"no LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start with torchrun or srun"):
        find_rank_environment({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE but no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK but no RANK, WORLD_SIZE"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE but no RANK"),
        ({**TORCHRUN, "WORLD_SIZE": "x"}, "WORLD_SIZE=x, which is no number"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK=-1, which is no number"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 of WORLD_SIZE=4"),
        ({**TORCHRUN, "MASTER_PORT": "a"}, "MASTER_PORT=a, which is no number"),
        ({**SRUN, "SLURM_NTASKS": "x"}, "WORLD_SIZE=x, which is no number"),
    ],
)
def test_a_rank_environment_that_cannot_be_is_refused_by_name(changed, told):
    with pytest.raises(ConfigError, match=f"the environment has {told}.*start with torchrun or srun"):
        find_rank_environment(changed)


def test_a_number_of_workers_left_by_a_script_is_none_of_sruns():
    assert find_rank_environment({**SRUN, "WORLD_SIZE": "7"}) == find_rank_environment(SRUN)
    assert find_rank_environment({"WORLD_SIZE": "1"}) is None


def test_a_clouds_variables_of_its_one_node_are_no_workers():
    node = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    assert find_rank_environment(node) is None
    assert find_rank_environment({**node, "LOCAL_RANK": "0"}) == {**node, "LOCAL_RANK": "0"}
    with pytest.raises(ConfigError, match="RANK and WORLD_SIZE but no LOCAL_RANK; start with torchrun"):
        find_rank_environment({**node, "WORLD_SIZE": "2"})


def test_sruns_place_follows_from_its_variables_and_is_one_meeting_point_for_all_tasks():
    found = find_rank_environment(SRUN)
    assert found is not None
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("9", "1", "16", "gpu03")
    assert 10_000 <= int(found["MASTER_PORT"]) < 30_000
    other = find_rank_environment({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert other is not None and other["MASTER_PORT"] == found["MASTER_PORT"]
    next_step = find_rank_environment({**SRUN, "SLURM_STEP_ID": "1"})
    assert next_step is not None and next_step["MASTER_PORT"] != found["MASTER_PORT"]
    chosen = find_rank_environment({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"})
    assert chosen is not None and (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("10.0.0.1", "5000")


def test_a_batch_script_and_a_single_task_start_their_own_workers():
    assert find_rank_environment({}) is None
    script = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert find_rank_environment({**script, "SLURM_PROCID": "0"}) is None
    assert find_rank_environment({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu[03-05,9],login", "gpu03"),
        ("gpu7", "gpu7"),
        ("a-1,b", "a-1"),
        ("rack[2,5]-node[1-2]", "rack2-node1"),
        ("n[1-2].site", "n1.site"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


def test_another_number_of_workers_than_configured_is_refused(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"hardware=2xcpu has 2 workers and 4 were started; start 2"):
        take_rank_environment(TORCHRUN, HardwareConfig(name="2xcpu", processes_per_node=2, strategy="ddp"))


class Probe(socket.socket):
    """Goes to no network: 10.0.0.1 is reached from 10.0.0.7, and this machine's name leads to itself."""

    def connect(self, address):
        if address[0] not in ("10.0.0.1", "localhost"):
            raise OSError("no route")
        self.own = "10.0.0.7" if address[0] == "10.0.0.1" else "127.0.0.1"

    def getsockname(self):
        return self.own, 0


@pytest.mark.parametrize("host, interface", [("10.0.0.1", "ib0"), ("localhost", None), ("elsewhere", None)])
def test_workers_of_several_nodes_meet_over_the_interface_that_leads_to_the_first(host, interface, monkeypatch):
    monkeypatch.setattr(socket, "socket", Probe)
    of_ib0, of_lo = SimpleNamespace(address="10.0.0.7"), SimpleNamespace(address="127.0.0.1")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [of_lo], "ib0": [of_ib0]})
    assert find_interface(host) == interface
    monkeypatch.setattr(os, "environ", {})
    hardware = HardwareConfig(name="own", nodes=2, processes_per_node=2, strategy=Strategy.ddp)
    take_rank_environment({**TORCHRUN, "MASTER_ADDR": host}, hardware)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface
    monkeypatch.setattr(os, "environ", {"GLOO_SOCKET_IFNAME": "eth9"})
    take_rank_environment({**TORCHRUN, "MASTER_ADDR": host}, hardware)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth9"
