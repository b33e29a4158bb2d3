"""The worker processes of a run on this machine: started, watched, ended together; torch is not imported here.

torchrun's agent would do for a start. It also ends workers 30 seconds after a signal, in the middle of a long
step's commit, leaves them behind when it is killed itself, and tells a failure in a page of its own; so a run's
own command watches its workers itself. Under torchrun or srun it starts none.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cqlora.config.schema import HardwareConfig
from cqlora.errors import Preempted, TrainingError, error_of_code
from cqlora.system.handover import FAILURE_FILE, STORE_SOCKET
from cqlora.system.signals import ASKING_TO_END, hear_signals

WORKERS_FOLDER = "workers"
"""In a run's folder: what workers beside the first one print, and why one failed."""

GRACE_SECONDS = 5.0
"""What is left to the other workers, when one has failed, to close what they have open."""
_LOG_LINES = 20


@dataclass(slots=True)
class WorkerProcess:
    """One started worker."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    """Where its output goes; rank 0's goes to the terminal."""
    failure: Path
    """Where it says why it fails."""
    killed: bool = False
    """Whether it was killed here because another had ended."""

    @property
    def code(self) -> int:
        """Exit code of an ended worker, minus a signal's number where one ended it."""
        return int(self.process.returncode)

    @property
    def died_silently(self) -> bool:
        """Whether it ended badly and did not say why: killed, out of memory, or crashed in native code."""
        return self.code != 0 and not self.killed and not self.failure.is_file()


def run_workers(run_file: Path, hardware: HardwareConfig) -> None:
    """Train from a settled configuration in processes of their own, one per GPU or as many as configured.

    Signals that ask for an end are passed on. When this process ends, however it ends, so do they.

    Raises:
        CqloraError: the error of the worker that failed first; Preempted when a signal stopped the run after a
            commit.
    """
    log_folder = run_file.parent / WORKERS_FOLDER
    log_folder.mkdir(exist_ok=True)
    for leftover in log_folder.iterdir():
        leftover.unlink()
    workers: list[WorkerProcess] = []
    received: list[int] = []
    try:
        with hear_signals(lambda number: pass_on(workers, number, received)):
            start_all(workers, run_file, hardware)
            for number in set(received):
                # Some had not been started yet when it came.
                pass_on(workers, number, [])
            wait_for_all(workers)
            end_all(workers)
    finally:
        for worker in workers:
            worker.process.kill()
    raise_failure(workers, received)


def start_all(workers: list[WorkerProcess], run_file: Path, hardware: HardwareConfig) -> None:
    """Start the workers of this machine, each of which is in the list as soon as it runs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Bound by the kernel and handed to rank 0 as it is, so that no other launch can take the port meanwhile.
        for rank in range(hardware.processes_per_node):
            workers.append(start_process(rank, run_file, hardware, listener))


def start_process(rank: int, run_file: Path, hardware: HardwareConfig, listener: socket.socket) -> WorkerProcess:
    """Start one worker, in a session of its own so that a terminal's Ctrl-C comes by way of this process."""
    log_folder = run_file.parent / WORKERS_FOLDER
    log = log_folder / f"rank{rank}.log" if rank else None
    failure = log_folder / f"rank{rank}.failure"
    environment = {**os.environ, **worker_environment(rank, hardware, listener), FAILURE_FILE: str(failure)}
    output = log.open("wb") if log else None
    process = subprocess.Popen(
        worker_command(run_file),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        pass_fds=[listener.fileno()] if rank == 0 else [],
    )
    if output is not None:
        output.close()
    return WorkerProcess(rank, process, log, failure)


def worker_command(run_file: Path) -> list[str]:
    """What trains from a settled configuration and ends with this process."""
    return [sys.executable, "-m", "cqlora.train", str(run_file), str(os.getpid())]


def worker_environment(rank: int, hardware: HardwareConfig, listener: socket.socket) -> dict[str, str]:
    """A worker's rank environment, under torchrun's names, and its share of the cores."""
    workers = hardware.processes_per_node
    if workers == 1:
        return {}
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": workers,
        "LOCAL_WORLD_SIZE": workers,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": listener.getsockname()[1],
        STORE_SOCKET: listener.fileno(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, len(os.sched_getaffinity(0)) // workers)),
    }
    if sys.platform.startswith("linux"):
        # All workers are on this machine, whose name may not resolve.
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return {name: str(value) for name, value in environment.items()}


def wait_for_all(workers: list[WorkerProcess]) -> None:
    """Return when every worker has ended well, or as soon as one has not."""
    while True:
        codes = [worker.process.poll() for worker in workers]
        if all(code == 0 for code in codes) or any(code for code in codes):
            return
        time.sleep(0.05)


def end_all(workers: list[WorkerProcess]) -> None:
    """Wait a little for those that still run, then kill them: they may wait for one that is gone."""
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        try:
            worker.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.killed = True
            worker.process.kill()
            worker.process.wait()


def pass_on(workers: list[WorkerProcess], number: int, received: list[int]) -> None:
    """Let every worker that still runs finish what it does, whatever the signal, and note it.

    Ctrl-C goes as SIGTERM, of which a worker that has only just started makes no traceback. A second one ends all.
    """
    received.append(number)
    if number == signal.SIGINT and len(received) > 1:
        raise KeyboardInterrupt
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)


def raise_failure(workers: list[WorkerProcess], received: list[int]) -> None:
    """Raise the error of the worker that failed first, if any did."""
    first = find_first_failure(workers)
    if first is None:
        return
    run_folder = first.failure.parent.parent
    again = f"the same command with hydra.run.dir={run_folder} goes on from the last checkpoint."
    stopped = next((worker for worker in workers if worker.code == Preempted.exit_code and received), None)
    if stopped is not None or not first.died_silently:
        # When one has left at a signal, the errors of the others follow from that.
        cause = stopped or first
        raise error_of_code(cause.code, cause.failure.read_text(encoding="utf-8"))
    if received and -first.code in ASKING_TO_END:
        raise Preempted(f"stopped by {signal.Signals(received[0]).name} before a step; {again}")
    raise TrainingError(f"worker {first.rank} of {len(workers)} {describe_end(first.code)}; {again}{tail(first.log)}")


def describe_end(code: int) -> str:
    """How a worker ended that reported no error."""
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL (by somebody, or by the system for want of memory)"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def find_first_failure(workers: list[WorkerProcess]) -> WorkerProcess | None:
    """The worker whose failure ended the others.

    One that died without reporting an error comes first, since the others failed of its death; then the one that
    reported first.
    """
    failed = [worker for worker in workers if worker.code != 0]
    silent = [worker for worker in failed if worker.died_silently]
    spoke = [worker for worker in failed if worker.failure.is_file()]
    spoke.sort(key=lambda worker: worker.failure.stat().st_mtime_ns)
    return next(iter(silent + spoke), None)


def tail(log: Path | None) -> str:
    """The last lines of a worker's output; rank 0's are on the terminal already."""
    if log is None:
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    return "".join(["\nIts last lines:", *(f"\n  {line.rstrip()}" for line in lines)]) if lines else ""
