"""Memory of a configured run: of each GPU, of the host, of the disk, against what the machine has."""

from dataclasses import dataclass, replace

from cqlora.config.choices import AdapterMethod, Checkpointing, Device, Optimizer
from cqlora.config.schema import HardwareConfig, RunConfig
from cqlora.plan.estimate import GIB, Estimate, estimate, packed_bytes, trainable_parameters
from cqlora.plan.fit import Fit, judge_fit, squeeze
from cqlora.plan.shapes import embedding_parameters, linear_parameters
from cqlora.plan.workload import Rows, Workload, describe_run

GPU_PROCESS_BYTES = 2 * GIB
"""Host memory of a worker with CUDA's libraries mapped and initialised."""

_PAGED = {Optimizer.paged_adamw: 8, Optimizer.paged_adamw_8bit: 2}


@dataclass(frozen=True)
class MemoryPlan:
    """What a run takes and what there is, in bytes."""

    device: Device
    worker: Estimate
    """One worker: a GPU's memory, or a process's on a CPU."""
    capacity: float | None
    """Memory of one GPU, or a worker's share of the host; None where it is not known."""
    host: float
    """Host memory of one node."""
    host_capacity: float | None
    disk: float
    """Checkpoints and the final adapter, at their most."""

    @property
    def peak(self) -> float:
        """Peak of one worker, the allocator's losses squeezed into what there is where that can be."""
        return squeeze(self.worker.peak, self.worker, self.capacity)

    @property
    def step(self) -> float:
        """Peak of a step, squeezed likewise."""
        return squeeze(self.worker.step, self.worker, self.capacity)

    @property
    def fit(self) -> Fit:
        """Whether the run fits, on each device and on the host."""
        if self.host_capacity is not None and self.host > self.host_capacity:
            return Fit.does_not_fit
        return judge_fit(self.worker, self.capacity)

    @property
    def parts(self) -> dict[str, float]:
        """Peak of a step by part; they add up to `step`."""
        worker = self.worker
        allocator = max(0.0, self.step - worker.allocated - worker.context)
        return {
            "weights": worker.weights,
            "embeddings": worker.embeddings,
            "adapter": worker.adapter,
            "optimizer states": worker.optimizer,
            "gradients": worker.gradients,
            "activations": worker.activations,
            "logits": worker.logits,
            "gathered units": worker.gathered,
            "buffers": worker.buffers,
            "allocator": allocator,
            "context": worker.context,
        }

    @property
    def phases(self) -> dict[str, float]:
        """Peak of loading, of a step and of saving."""
        return {"loading": self.worker.loading, "step": self.step, "save": self.worker.save}


def choose_checkpointing(config: RunConfig, rows: Rows | None = None) -> Checkpointing:
    """What `activation_checkpointing=auto` is, all else settled: activations are recomputed only where needed."""
    kept = replace(config, hardware=replace(config.hardware, activation_checkpointing=Checkpointing.none))
    return Checkpointing.none if plan_memory(kept, rows).fit is Fit.fits else Checkpointing.full


def plan_memory(config: RunConfig, rows: Rows | None = None) -> MemoryPlan:
    """The memory of a run, from its settled configuration alone."""
    work = describe_run(config, rows)
    worker = estimate(work)
    hardware = config.hardware
    device = hardware.device
    host = _host_bytes(config, work, worker, device)
    host_capacity = hardware.host_memory_gib * GIB or None
    return MemoryPlan(
        device=device,
        worker=worker,
        capacity=_capacity(hardware, device, host_capacity),
        host=host,
        host_capacity=host_capacity,
        disk=_disk_bytes(config, work),
    )


def _capacity(hardware: HardwareConfig, device: Device, host_capacity: float | None) -> float | None:
    if device is Device.cpu:
        return host_capacity / hardware.processes_per_node if host_capacity else None
    return hardware.gpu_memory_gib * GIB or None


def _host_bytes(config: RunConfig, work: Workload, worker: Estimate, device: Device) -> float:
    workers = config.hardware.processes_per_node
    if device is Device.cpu:
        return workers * worker.peak
    trained = trainable_parameters(work)
    # A checkpoint's states are held once as tensors and twice as bytes while they are written.
    saving = 3 * trained * (work.program.adapter_bytes + max(work.program.optimizer_bytes, 8))
    paged = trained * _PAGED.get(config.stage.optimizer, 0)
    offloaded = 0.0
    if work.cpu_offload:
        base = sum(packed_bytes(work, linear_parameters(work.model)))
        embeddings = embedding_parameters(work.model) * work.program.embedding_bytes
        states = trained * (2 * work.program.adapter_bytes + work.program.optimizer_bytes)
        offloaded = (base + embeddings + states) * work.copies / config.hardware.nodes
    return workers * GPU_PROCESS_BYTES + saving + paged + offloaded


def _disk_bytes(config: RunConfig, work: Workload) -> float:
    trained = trainable_parameters(work)
    states = _PAGED.get(config.stage.optimizer, work.program.optimizer_bytes)
    checkpoint = trained * (work.program.adapter_bytes + states)
    ranks = 2 if config.lora.method is AdapterMethod.pissa else 1
    # One more than is kept exists while a new one is written.
    return (config.stage.keep_last + 1) * checkpoint + (2 * ranks - 1) * trained * work.program.adapter_bytes
