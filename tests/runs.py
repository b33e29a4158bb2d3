"""Training runs for tests: composed as a user's, on the tiny model, each in a child that may be killed."""

import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from cqlora.config.diagnosis import to_schema
from cqlora.config.run_yaml import load_run_yaml, write_run_yaml
from cqlora.config.schema import CONFIG_DIR, RunConfig, register_schemas
from cqlora.errors import CqloraError
from cqlora.launch.preflight import check_run
from cqlora.launch.settle import look_around, settle
from cqlora.system.metrics import read_metrics
from tests.commands import forked
from tests.conftest import HANG_SECONDS

SMALL = (
    "model=tiny",
    "data=sample",
    "hardware=cpu",
    "tracking=none",
    "hardware.precision=float32",
    "hardware.micro_batch_size=1",
    "stage.global_batch_size=2",
    "lora.rank=4",
    "lora.dropout=0.1",
    "stage.eval_tokens=300",
)
"""Accumulation 2, dropout on, seconds long."""


def typed_run(workspace: Path, *overrides: str, folder: Path = Path("/nowhere")) -> RunConfig:
    """A small run's configuration, settled and checked, with models and caches in the shared workspace."""
    register_schemas()
    GlobalHydra.instance().clear()
    paths = (f"model.path={workspace}/models/tiny", f"data.cache_dir={workspace}/cache")
    chosen = {override.partition("=")[0] for override in overrides}
    # A group is chosen once.
    small = [override for override in (*SMALL, *paths) if override.partition("=")[0] not in chosen]
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        config: RunConfig = to_schema(compose("config", [*small, *overrides]), RunConfig)
    given = look_around(config, folder)
    settled = settle(config, given)
    check_run(settled, given)
    return settled


def start_run(config: RunConfig, folder: Path, plant: Callable[[], None] | None = None) -> ForkServerProcess:
    """Start a run in a child; `plant`, a function of a test module, sets a trap in it first."""
    child = forked.Process(target=_train, args=(write_run_yaml(config, folder), plant))
    child.start()
    return child


def finish_run(config: RunConfig, folder: Path, plant: Callable[[], None] | None = None) -> int:
    """Run to the end; the child's exit code, negative when a signal ended it."""
    child = start_run(config, folder, plant)
    child.join(timeout=HANG_SECONDS)
    assert child.exitcode is not None, "the run hangs"
    return child.exitcode


def start_workers(config: RunConfig, folder: Path, plant: Callable[[], None] | None = None) -> list[ForkServerProcess]:
    """Start a run of several workers as torchrun would, a child each; `plant` is run in every one."""
    run_file, port = write_run_yaml(config, folder), free_port()
    children = []
    for rank in range(config.hardware.world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": config.hardware.world_size}
        place |= {"LOCAL_WORLD_SIZE": config.hardware.world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in place.items()}
        children.append(forked.Process(target=_train, args=(run_file, plant, environment)))
        children[-1].start()
    return children


def finish_workers(config: RunConfig, folder: Path, plant: Callable[[], None] | None = None) -> list[int | None]:
    """Run several workers to the end; their exit codes by rank."""
    children = start_workers(config, folder, plant)
    for child in children:
        child.join(timeout=HANG_SECONDS)
        assert child.exitcode is not None, "the run hangs"
    return [child.exitcode for child in children]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def build_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """A folder that the first test process that asks for it fills by `build`, and that all read."""
    with FileLock(f"{folder}.lock"):
        if not Path(f"{folder}.built").exists():
            shutil.rmtree(folder, ignore_errors=True)
            build(folder)
            Path(f"{folder}.built").touch()
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of every training line, which a resumed run must repeat to the last bit."""
    return [(row["step"], row["loss"]) for row in read_metrics(folder) if row["kind"] == "train"]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """Every evaluation line."""
    return [row for row in read_metrics(folder) if row["kind"] == "eval"]


def events(folder: Path) -> list[str]:
    """What happened, in order."""
    return [row["event"] for row in read_metrics(folder) if row["kind"] == "event"]


def adapter_sha256(folder: Path) -> str:
    """Hash of the final adapter's weights."""
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def wait_for_step(child: ForkServerProcess, folder: Path, step: int) -> None:
    """Return as soon as the run has recorded `step`, or ended."""
    while child.is_alive():
        if any(number >= step for number, _ in losses(folder)):
            return
        child.join(timeout=0.01)


def kill(child: ForkServerProcess) -> None:
    """kill -9, and wait until it is gone."""
    if child.is_alive():
        os.kill(child.pid or 0, signal.SIGKILL)
    child.join()


def _train(run_file: Path, plant: Callable[[], None] | None, environment: dict[str, str] | None = None) -> None:
    os.environ.update(environment or {})
    import torch

    from cqlora.model.throughput import measure_matmul_flops
    from cqlora.train import trainer
    from cqlora.train.run import train

    torch.set_num_threads(1)
    # Of no use to runs that are no longer than that.
    trainer.measure_matmul_flops = functools.partial(measure_matmul_flops, seconds=0.01)
    if plant is not None:
        plant()
    rank = os.environ.get("RANK", "0")
    log = (run_file.parent / ("stderr.txt" if rank == "0" else f"stderr-rank{rank}.txt")).open("a")
    os.dup2(log.fileno(), 2)
    try:
        train(load_run_yaml(run_file), run_file.parent)
    except CqloraError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return dict(json.loads((folder / "state.json").read_text()))


def build_base(workspace: Path, folder: Path, tied: bool) -> Path:
    """A tiny base of its own in `folder`: a copy of one that is built once."""
    from cqlora.data.chat import CHAT_TEMPLATE
    from cqlora.data.sources import SAMPLE_DIR
    from cqlora.model.tiny import build_tiny, read_sample_texts

    def build(built: Path) -> None:
        config = typed_run(workspace, "stage=pretrain").model
        config.path, config.tie_word_embeddings = str(built), tied
        build_tiny(config, read_sample_texts(SAMPLE_DIR), CHAT_TEMPLATE)

    return shutil.copytree(build_once(workspace / f"base-{'tied' if tied else 'untied'}", build), folder)


def extend_tiny(workspace: Path, folder: Path, tied: bool) -> Path:
    """A tiny base whose card says that its rows 2,000 to 2,047 were added."""
    built = build_base(workspace, folder / "extended", tied)
    (built / "cqlora.json").write_text(json.dumps({"first_added_row": 2000, "added_rows": 48}))
    return built
