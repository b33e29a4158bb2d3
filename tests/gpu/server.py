"""Answers questions about programs on GPUs that are not there, each in a process that is forked for it.

A line of JSON with the name of a function of `cases.py` and its arguments comes in, a line with what it returns, or
with the traceback of what went wrong, goes out. `guard.py`'s environment has to be there from the beginning.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.gpu.guard import fake_gpu_environment


class Server:
    """The process that answers, started by the one that asks."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.server"],
            env=fake_gpu_environment(folder),
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, case: str, *arguments: Any, **options: Any) -> Any:
        """What a function of `cases.py` returns there; AssertionError with its traceback where it raises."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([case, arguments, options]), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline() or '{"error": "the server of fake GPUs has ended"}')
        assert "error" not in answer, answer["error"]
        return answer["returned"]

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def main() -> None:
    """Import once, and fork for every question."""
    from tests.gpu import cases

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            with open(writing, "w") as pipe:
                pipe.write(answer(cases, *json.loads(line)))
            os._exit(0)
        os.close(writing)
        with open(reading) as pipe:
            print(pipe.read() or '{"error": "the forked process has died"}', file=answers, flush=True)
        os.waitpid(child, 0)


def answer(cases: Any, name: str, arguments: list[Any], options: dict[str, Any]) -> str:
    """One question's line."""
    try:
        return json.dumps({"returned": getattr(cases, name)(*arguments, **options)})
    except BaseException:  # noqa: BLE001 - whatever it is, the one who asks is told
        return json.dumps({"error": traceback.format_exc()})


if __name__ == "__main__":
    main()
