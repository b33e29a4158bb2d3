"""GPUs that are not there for a program's steps, and workers that are not there beside it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from cqlora.system import shards
from tests.gpu.fake_gpu import Card, FakeGpu, pretend
from tests.gpu.meter import Meter


@contextmanager
def fake_gpus(card: Card, meter: Meter) -> Iterator[FakeGpu]:
    """GPUs to compute on."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # other threads would be outside
    shards._fill = lambda *_: None  # the holes' zeros need not be read
    with pretend(card, meter) as gpu:
        yield gpu


def take_place(workers: int) -> None:
    """Be the first of some workers, in the environment."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(workers), LOCAL_WORLD_SIZE=str(workers))


def join_nobody(*_: Any) -> dist.ProcessGroup | None:
    """Meet the other workers, who never answer: what they would send is as this one has it."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=int(os.environ["WORLD_SIZE"]))
    return dist.group.WORLD
