"""Workers as processes: which error is told, which signals arrive, and that none outlives the command."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import cqlora.launch.processes
from cqlora.config.choices import Device, Strategy
from cqlora.config.schema import HardwareConfig
from cqlora.errors import ConfigError, Preempted, TrainingError
from cqlora.launch.processes import run_workers
from tests.conftest import HANG_SECONDS, ROOT

PRELUDE = """
import os, signal, sys, time
from cqlora.system.handover import write_failure
from cqlora.system.signals import die_with
rank, folder = int(os.environ["RANK"]), sys.argv[1]
die_with(int(sys.argv[2]))
open(f"{folder}/pid{rank}", "w").write(str(os.getpid()))
def wait_for(name):
    while not os.path.exists(f"{folder}/{name}"): time.sleep(0.01)
"""


def machine(workers: int) -> HardwareConfig:
    return HardwareConfig(name="own", device=Device.cpu, processes_per_node=workers, strategy=Strategy.ddp)


@pytest.fixture
def work(monkeypatch, tmp_path):
    """Let workers run a few lines instead of training; returns what runs them."""

    def run(lines: str, workers: int = 2) -> None:
        script = PRELUDE + textwrap.dedent(lines)
        command = [sys.executable, "-c", script, str(tmp_path), str(os.getpid())]
        monkeypatch.setattr(cqlora.launch.processes, "worker_command", lambda run_file: command)
        monkeypatch.chdir(ROOT)
        run_workers(tmp_path / "run.yaml", machine(workers))

    return run


def is_running(pid: int) -> bool:
    """Whether a process exists and is more than an exit code that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_gone(*pids: int) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its command"
        time.sleep(0.02)


def test_each_worker_has_its_place_and_threads_and_all_the_same_meeting_point(work, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(12)))
    work(
        """
        names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
        names += ["OMP_NUM_THREADS"]
        open(f"{folder}/environment{rank}", "w").write(" ".join(os.environ[name] for name in names))
        """,
        workers=3,
    )
    environments = [(tmp_path / f"environment{rank}").read_text().split() for rank in range(3)]
    assert [each[:5] for each in environments] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({each[5] for each in environments}) == 1
    assert {each[6] for each in environments} == {"4"}


def test_the_error_that_came_first_is_reported_and_not_those_that_followed_from_it(work):
    with pytest.raises(ConfigError, match=r"^worker 1 was asked for the impossible$"):
        work(
            """
            if rank == 1:
                write_failure("worker 1 was asked for the impossible")
                open(f"{folder}/failed", "w")
                time.sleep(0.3)
                sys.exit(2)
            wait_for("failed")
            write_failure("connection closed by peer")
            sys.exit(1)
            """
        )


def test_a_worker_that_is_killed_is_named_with_what_it_said_last_and_those_that_wait_for_it_end(
    work, monkeypatch, tmp_path
):
    monkeypatch.setattr(cqlora.launch.processes, "GRACE_SECONDS", 0.5)
    with pytest.raises(
        TrainingError, match=r"(?s)worker 2 of 3 was killed by SIGKILL .*hydra\.run.*\n  so far so good$"
    ):
        work(
            """
            if rank == 2:
                print("so far so good", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 1:
                wait_for("pid2")
                write_failure("connection closed by peer")
                sys.exit(1)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(10**6)
            """,
            workers=3,
        )
    assert_gone(*(int((tmp_path / f"pid{rank}").read_text()) for rank in range(3)))


def test_a_signal_is_passed_on_and_what_the_workers_make_of_it_is_reported(work):
    def lines(code: int) -> str:
        return f"""
            def leave(number, frame):
                write_failure("stopped after step 7")
                sys.exit({code})
            if {code}:
                signal.signal(signal.SIGTERM, leave)
            open(f"{{folder}}/ready{{rank}}", "w")
            if rank == 0:
                wait_for("ready1")
                os.kill(int(sys.argv[2]), signal.SIGTERM)
            time.sleep(10**6)
            """

    with pytest.raises(Preempted, match=r"^stopped after step 7$"):
        work(lines(75))
    # One that is still loading has nothing to commit.
    with pytest.raises(Preempted, match="stopped by SIGTERM before a step"):
        work(lines(0))


def test_when_the_command_is_killed_no_worker_is_left(tmp_path):
    script = f"""
    import os, sys
    from pathlib import Path
    import cqlora.launch.processes
    from tests.launch.test_processes import PRELUDE, machine
    command = [sys.executable, "-c", PRELUDE + "time.sleep(10**6)", {str(tmp_path)!r}, str(os.getpid())]
    cqlora.launch.processes.worker_command = lambda run_file: command
    cqlora.launch.processes.run_workers(Path({str(tmp_path)!r}) / "run.yaml", machine(2))
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT)
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    while not all(file.is_file() and file.read_text() for file in files):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert_gone(*(int(file.read_text()) for file in files))


def test_processes_that_prepare_data_end_with_the_one_that_they_work_for(tmp_path):
    script = f"""
    import multiprocessing, time
    from cqlora.data.workers import Workers
    if __name__ == "__main__":
        with Workers(2) as workers:
            for number, _ in enumerate(workers.map_in_order(time.sleep, [0.0] * 200 + [10.0**6] * 2)):
                pids = " ".join(str(child.pid) for child in multiprocessing.active_children())
                if number == 150:
                    open({str(tmp_path / "pids")!r}, "w").write(pids)
    """
    (tmp_path / "prepare.py").write_text(textwrap.dedent(script))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "prepare.py")], env=environment)
    while not (tmp_path / "pids").is_file() or not (tmp_path / "pids").read_text():
        assert parent.poll() is None
        time.sleep(0.02)
    children = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(children) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert_gone(*children)


def test_ctrl_c_to_all_processes_of_a_preparation_is_heard_by_the_first_one_alone(tmp_path):
    script = """
    import multiprocessing, os, signal, time
    from cqlora.data.workers import Workers
    from cqlora.system.signals import Stopped, stop_on_signals
    if __name__ == "__main__":
        try:
            with stop_on_signals(), Workers(2) as workers:
                for number, _ in enumerate(workers.map_in_order(time.sleep, [0.0] * 200 + [0.5] * 100)):
                    if number == 150:
                        for child in multiprocessing.active_children():
                            os.kill(child.pid, signal.SIGINT)
                            os.kill(child.pid, signal.SIGUSR2)
                    if number == 190:
                        os.killpg(0, signal.SIGINT)
        except Stopped as stopped:
            print(stopped.name, number, len(multiprocessing.active_children()))
    """
    (tmp_path / "prepare.py").write_text(textwrap.dedent(script))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "prepare.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, start_new_session=True)
    assert (done.stdout, done.stderr) == ("SIGINT 190 0\n", "")


def test_a_worker_of_a_preparation_that_a_signal_to_all_reached_first_is_no_failure(tmp_path):
    script = """
    import multiprocessing, os, signal, threading, time
    from cqlora.data.workers import Workers
    from cqlora.system.signals import Stopped, stop_on_signals
    if __name__ == "__main__":
        try:
            with stop_on_signals(), Workers(2) as workers:
                for number, _ in enumerate(workers.map_in_order(time.sleep, [0.0] * 200 + [0.01] * 1000)):
                    if number == 150:
                        first, second = multiprocessing.active_children()
                        first.terminate()
                        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        except Stopped as stopped:
            print(stopped.name)
    """
    (tmp_path / "prepare.py").write_text(textwrap.dedent(script))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "prepare.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "SIGTERM\n", done.stderr
