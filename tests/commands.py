"""`python -m cqlora.VERB …` for tests, forked from a process that has torch, transformers and peft imported.

An interpreter of its own imports them for five seconds of processor time, and the suite starts more than a hundred.
A forked command has the arguments, environment, folder, streams and exit code of one that was started, and forks the
workers that it starts in the same way (`tests/test_commands.py` compares).
What is about an interpreter's beginning starts one: signals while it imports, and closed or strange streams.
"""

import atexit
import contextlib
import functools
import gc
import logging
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

forked = multiprocessing.get_context("forkserver")
"""Its children start from one process of each test process, which has imported tests/preloaded.py and run nothing."""
forked.set_forkserver_preload(["tests.preloaded", "tests.runs"])
_is_command = False
"""Whether this process is one, and so has run what its workers must not find."""


def run_command(
    command: Sequence[str], folder: Path, environment: dict[str, str], timeout: float
) -> "subprocess.CompletedProcess[str]":
    """As `subprocess.run` with both streams captured and nothing to read, for `[python, -m MODULE, …]` of this package,
    a script's file or `-c CODE`."""
    server = start_server()
    server.send({"args": list(command), "cwd": folder, "env": environment, "timeout": timeout})
    return subprocess.CompletedProcess(**server.recv())


@functools.cache
def start_server() -> "Connection[Any, Any]":
    """Start the process that forks this one's commands; it ends when the connection does."""
    ours, theirs = forked.Pipe()
    # Where the fork server, if this starts it, finds what it is to import.
    with contextlib.chdir(Path(__file__).parent.parent):
        forked.Process(target=serve, args=(theirs,)).start()
    theirs.close()
    # Before multiprocessing waits for it.
    atexit.register(ours.close)
    return ours


def serve(requests: "Connection[Any, Any]") -> None:
    """Run commands one after another until there are no more."""
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    with contextlib.suppress(EOFError):
        while True:
            options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
            requests.send(vars(subprocess.run(**requests.recv(), **options)))


class ForkingPopen(subprocess.Popen[Any]):
    """Starts this package's commands by a fork that goes on as they would begin, and all others as ever."""

    def __init__(self, args: Any, *rest: Any, **options: Any) -> None:
        if is_own_command(args):
            environment, kept = options.get("env"), tuple(options.get("pass_fds", ()))
            options["preexec_fn"] = functools.partial(become, [str(word) for word in args], environment, kept)
        super().__init__(args, *rest, **options)


def is_own_command(args: Any) -> bool:
    """Whether these words start Python with code, a script, or a module of this package."""
    if isinstance(args, str) or len(args) < 2 or str(args[0]) != sys.executable:
        return False
    first = str(args[1])
    return first == "-c" or first.endswith(".py") or (first == "-m" and args[2].partition(".")[0] == "cqlora")


def become(command: list[str], environment: dict[str, str] | None, kept: tuple[int, ...]) -> NoReturn:
    """Be the interpreter that a command asks for, in a process that was forked for it, from beginning to end."""
    inherited = dict(sys.modules), sys.stdin, sys.stdout, sys.stderr
    forget_modules(command)
    forget_parent(kept)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    open_streams()
    code = run_to_end(command)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    # What was inherited is held until here, lest a file of it be closed by a number that is another's by now, or a
    # line of the parent's be written twice.
    os._exit(code if inherited else 1)


def forget_modules(command: list[str]) -> None:
    """Leave no module that has run, and not the one that is to be run."""
    global _is_command
    for name, module in list(sys.modules.items()):
        is_program = name in command[2:3] and not hasattr(module, "__path__")
        if is_program or (_is_command and name.partition(".")[0] in ("cqlora", "hydra_plugins")):
            del sys.modules[name]
    if _is_command and "hydra.core.global_hydra" in sys.modules:
        # Hydra knows the program that starts this one.
        sys.modules["hydra.core.global_hydra"].GlobalHydra.instance().clear()
    _is_command = True


def forget_parent(kept: tuple[int, ...]) -> None:
    """Leave no open file, no signal handler and no duty at exit of the process that this one was forked from."""
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in kept:
            with contextlib.suppress(OSError):  # the folder's own
                os.close(number)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    # As Python begins.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    gc.enable()
    vars(resource_tracker._resource_tracker).update(_fd=None, _pid=None)
    atexit._clear()
    atexit.register(logging.shutdown)
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]


def open_streams() -> None:
    """Streams with nothing in their buffers."""
    out = {"encoding": sys.stdout.encoding, "closefd": False}
    sys.stdin = open(0, encoding=sys.stdout.encoding, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", errors=sys.stdout.errors, **out)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", **out)  # noqa: SIM115


def run_to_end(command: list[str]) -> int:
    """Run code, a module or a script as the main one; its exit code."""
    sys.orig_argv, (first, *words) = command, command[1:]
    python_path = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:0] = [str(Path(first).parent) if first.endswith(".py") else os.getcwd(), *python_path]
    sys.argv = [first, *words] if first.endswith(".py") else words if first == "-m" else [first, *words[1:]]
    try:
        if first == "-m":
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(first, run_name="__main__")
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return (ended.code or 0) & 0xFF
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
