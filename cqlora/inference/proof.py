"""Native code that is called by a hard-coded signature is proven before it is trusted.

Another version of a library may take other arguments, or lay its matrices out in another order: the numbers are wrong
then, or the process dies. So a child process multiplies a small matrix both ways, once for each version of the library
and each processor; where that fails the engine goes the plain way.
"""

import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cqlora.errors import DiskError
from cqlora.system.durable import replace_file
from cqlora.system.machine import cache_folder
from cqlora.system.processor import describe_processor
from cqlora.system.sealed import hash_document

_ROOT = Path(__file__).parent.parent.parent
_CHILD_SECONDS = 600.0
_HIDING = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Environment variables that make a library take other kernels than the processor allows."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NativeCall:
    """A function of a library that promises nobody its signature."""

    name: str
    """What it is, at the beginning of a sentence."""
    package: str
    """The distribution that brings it."""
    check: str
    """`module:function`, which raises an error where the call does not give what the plain product gives."""


@cache
def is_proven(call: NativeCall) -> bool:
    """Whether the call may be trusted on this machine; where it may not, that is said once."""
    proof = proof_file(call)
    if proof.is_file():
        return True
    failure = find_failure(call)
    if failure:
        logger.warning("%s %s; the engine computes without it, more slowly.", call.name, failure)
        return False
    with suppress(DiskError):
        # Where it cannot be kept the next start checks again.
        replace_file(proof, b"")
    return True


def proof_file(call: NativeCall) -> Path:
    """The empty file in the user's cache folder that stands for a check that was passed."""
    try:
        installed = version(call.package)
    except PackageNotFoundError:
        installed = "unknown"
    hidden = {name: os.environ.get(name, "") for name in _HIDING}
    return cache_folder("proven") / hash_document([call.check, installed, describe_processor(), hidden])[:32]


def find_failure(call: NativeCall) -> str:
    """Do the check in a child process; what went wrong, as the rest of a sentence, or "" where nothing did."""
    module, _, function = call.check.partition(":")
    code = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from {module} import {function}; {function}()"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_CHILD_SECONDS,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"could not be checked ({error})"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"ended the process that checked it ({signal.Signals(-done.returncode).name})"
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return f"failed its check ({reason.partition(': ')[2] or reason})"
