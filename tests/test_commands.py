"""A forked command is the one that is started: what it is given, what it has, how it ends."""

import os
import signal
import subprocess
import sys

import pytest

from tests.commands import is_own_command, run_command
from tests.conftest import HANG_SECONDS, ROOT

SCRIPT = """
import atexit, json, os, signal, subprocess, sys, threading, time
atexit.register(print, "at exit")
if sys.argv[1:2] == ["worker"]:
    print(len(sys.argv), os.environ.get("OF_WORKER"), os.read(int(sys.argv[2]), 9), os.getppid() == int(sys.argv[3]))
    sys.exit(5)
print("to stderr", file=sys.stderr)
print(json.dumps({
    "argv": sys.argv[1:], "orig_argv": sys.orig_argv[1:], "name": __name__, "folder": os.getcwd(),
    "environment": {name: value for name, value in os.environ.items() if name != "LC_CTYPE"},
    "path": sys.path[:2], "input": sys.stdin.read(), "encoding": sys.stdout.encoding, "errors": sys.stdout.errors,
    "signals": [str(signal.getsignal(number)) for number in (2, 10, 13, 15)],
    "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(),
    "session": os.getsid(0) == os.getpid(),
}))
{end}
"""
ENDS = {
    "the last line": "",
    "a code": "sys.exit(300)",
    "a sentence": "sys.exit('no such thing')",
    "an exception": "raise ValueError('中文')",
    "a signal": "sys.stdout.flush(); os.kill(os.getpid(), 15); time.sleep(60)",
    "a thread that is not done": "threading.Timer(0.05, print, ['from a thread']).start()",
    "workers": """
read, write = os.pipe()
for session in (False, True):
    worker = subprocess.Popen(
        [sys.executable, __file__, "worker", str(read), str(os.getpid())], env={"OF_WORKER": "its own"},
        pass_fds=[read], start_new_session=session, stdout=subprocess.PIPE, text=True,
    )
    os.write(write, b"handed on")
    print(worker.communicate()[0], worker.returncode)
""",
}


def last_line(text: str) -> str:
    return text.splitlines()[-1] if text else ""


def hear_interrupts() -> None:
    """As in a terminal, wherever the tests run: a shell lets what it starts in the background ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_forked_script_has_what_one_that_is_started_has_and_ends_as_it_does(end, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("{end}", end), encoding="utf-8")
    command = [sys.executable, str(script), "a b", "中"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "MINE": "值", "LC_ALL": "C.UTF-8"}
    forked = run_command(command, tmp_path, environment, HANG_SECONDS)
    started = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        preexec_fn=hear_interrupts,
    )  # fmt: skip
    assert (forked.returncode, forked.stdout) == (started.returncode, started.stdout)
    assert last_line(forked.stderr) == last_line(started.stderr)


def test_a_forked_module_is_the_packages_program(tmp_path):
    command = [sys.executable, "-m", "cqlora.run", "stage=pretrain", "model=tiny", "stage.max_step=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    forked = run_command(command, tmp_path, environment, HANG_SECONDS)
    started = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert vars(forked) == vars(started) and forked.returncode == 2
    assert "did you mean stage.max_steps?" in forked.stderr


def test_other_programs_are_started():
    assert is_own_command([sys.executable, "-m", "cqlora.train", "run.yaml"])
    assert not is_own_command([sys.executable, "-m", "torch.distributed.run"])
    assert not is_own_command(["cqlora", "run"]) and not is_own_command("cqlora run")
