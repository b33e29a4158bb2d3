"""What is asked of `server.py`: programs on GPUs that are not there, and what is told of each, as JSON has it."""

import tempfile
from pathlib import Path
from typing import Any

from cqlora.plan.memory import plan_memory
from tests.gpu import count_kernels as counting
from tests.gpu.fake_gpu import Card
from tests.gpu.fake_step import build_module, compose_hollow, fake_gpus, take_step
from tests.gpu.meter import Meter


def measure_step(*overrides: str, capability: tuple[int, int] = (9, 0)) -> dict[str, Any]:
    """Bytes of tensors on the fullest GPU of a worker, loading and in its second step, beside the plan's."""
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        config = compose_hollow(Path(folder), *overrides)
        hardware, worker = config.hardware, plan_memory(config).worker
        card = Card(gpus_of(config), tuple(capability), hardware.gpu_memory_gib)
        with fake_gpus(card, meter, hardware.world_size):
            module, optimizer = build_module(config)
            loading = max(meter.peak.values())
            take_step(config, module, optimizer)
            meter.restart()
            take_step(config, module, optimizer)
            return {
                "measured": max(meter.peak.values()),
                "planned": worker.allocated,
                "moment": worker.moment,
                "held": max(meter.alive.values()),
                "planned_held": worker.held,
                "loading": loading,
                "planned_loading": worker.loading_allocated,
                "products": sorted({dtype for _, dtype in meter.products}),
                "waits": [[*key, times] for key, times in sorted(meter.waits.items())],
                "kernels": meter.kernels.total(),
            }


def count_kernels(*overrides: str) -> dict[str, Any]:
    """Kernels of a micro batch of 7B, as `count_kernels.py` has them."""
    return vars(counting.count_kernels(*overrides))


def gpus_of(config: Any) -> int:
    """GPUs of a node."""
    return int(max(config.hardware.processes_per_node, config.hardware.gpus_per_node))
