"""Processes with a CUDA device that is not there: `fake_cuda.cpp` compiled, and loaded before torch."""

import hashlib
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")


def why_no_fake_gpu() -> str | None:
    """What keeps this machine from having one; None where it can."""
    import torch

    if not sys.platform.startswith("linux"):
        return "the fake GPU is loaded as Linux loads libraries"
    if torch.version.cuda:
        return "this torch was built for CUDA, whose own device takes the fake one's place"
    if find_compiler() is None:
        return "no C++ compiler (c++, g++ or clang++) to compile the fake GPU with"
    return None


def find_compiler() -> str | None:
    """The first of the usual C++ compilers that is here."""
    return next(
        (path for name in (os.environ.get("CXX", "c++"), "g++", "clang++") if (path := shutil.which(name))), None
    )


def torch_folder() -> Path:
    """Where torch is installed, without importing it."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def compile_guard(folder: Path) -> Path:
    """The library, compiled once into `folder` for each text of its source and each torch."""
    import torch

    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"fake_cuda-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    root, half_done = torch_folder(), folder / f"{library.name}.{os.getpid()}"
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = [find_compiler(), "-std=c++20", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", *includes]
    subprocess.run([*map(str, command), str(SOURCE), *libraries, "-o", str(half_done)], check=True)
    half_done.replace(library)
    return library


def fake_gpu_environment(folder: Path) -> dict[str, str]:
    """Environment of a process whose torch shall find the device."""
    return {**os.environ, "LD_PRELOAD": str(compile_guard(folder)), "OMP_NUM_THREADS": "1"}
