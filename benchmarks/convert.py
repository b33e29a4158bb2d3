"""Time and memory of `cqlora convert`, beside copying the same bytes and beside transformers' converter.

    python benchmarks/convert.py RAW_FOLDER [--repeat 3] [--transformers convert_llama_weights_to_hf.py]

RAW_FOLDER holds weights in Meta's layout; benchmarks/meta_weights.py writes random ones of any shape. The input
is dropped from the page cache before each run. Memory is the highest anonymous resident size of the process,
which leaves out mapped file pages; the highest total is shown too. Every writer's files are synced to the disk.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
_SAMPLE_SECONDS = 0.05
_COPY = "import shutil, sys, os; shutil.copyfile(sys.argv[1], sys.argv[2]); os.fsync(os.open(sys.argv[2], os.O_RDWR))"


def main() -> None:
    """Run each way `--repeat` times, one after the other, and print the best and the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--transformers", type=Path, help="transformers' convert_llama_weights_to_hf.py")
    arguments = parser.parse_args()
    ways = ["copy", "cqlora"] + (["transformers"] if arguments.transformers else [])
    runs: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for _ in range(arguments.repeat):
        for way in ways:
            runs[way].append(run(way, arguments.raw, arguments.transformers))
    gigabytes = sum(file.stat().st_size for file in arguments.raw.glob("*.pth")) / 1e9
    print(f"{arguments.raw.name}: {gigabytes:.2f} GB")
    print(f"{'':14}{'best s':>10}{'median s':>10}{'anonymous GiB':>16}{'resident GiB':>14}")
    for way, figures in runs.items():
        seconds = sorted(figure[0] for figure in figures)
        anonymous, resident = (max(figure[column] for figure in figures) for column in (1, 2))
        print(f"{way:14}{seconds[0]:10.1f}{seconds[len(seconds) // 2]:10.1f}{anonymous:16.2f}{resident:14.2f}")
    ratio = min(figure[0] for figure in runs["cqlora"]) / min(figure[0] for figure in runs["copy"])
    print(f"cqlora takes {ratio:.2f} times as long as copying")


def run(way: str, raw: Path, script: Path | None) -> tuple[float, float, float]:
    """Seconds, highest anonymous and highest total resident GiB of one way."""
    output = Path(tempfile.mkdtemp(prefix="convert-", dir=raw.parent))
    commands = {
        "copy": [sys.executable, "-c", _COPY, str(raw / "consolidated.00.pth"), str(output / "copy.pth")],
        "cqlora": [sys.executable, "-m", "cqlora.convert", f"input_dir={raw}", f"output_dir={output / 'model'}"],
        "transformers": [
            sys.executable, str(script), "--input_dir", str(raw), "--output_dir", str(output / "model"),
            "--num_shards", "1", "--llama_version", "1",
        ],
    }  # fmt: skip
    drop_from_cache(raw)
    os.sync()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen(commands[way], env=environment, stdout=subprocess.DEVNULL)
    anonymous = resident = 0.0
    while process.poll() is None:
        sizes = read_sizes(process.pid)
        anonymous, resident = max(anonymous, sizes[0]), max(resident, sizes[1])
        time.sleep(_SAMPLE_SECONDS)
    if way == "transformers":
        os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(output)
    if process.returncode:
        raise SystemExit(f"{way} failed with {process.returncode}")
    return seconds, anonymous, resident


def read_sizes(pid: int) -> tuple[float, float]:
    """Anonymous and total resident GiB of a process now."""
    sizes = {"RssAnon": 0.0, "VmRSS": 0.0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in sizes:
                sizes[key] = int(value.split()[0]) / 2**20
    except FileNotFoundError:
        pass  # it ended meanwhile
    return sizes["RssAnon"], sizes["VmRSS"]


def drop_from_cache(folder: Path) -> None:
    """Ask the kernel to forget a folder's files, so that each run reads them from the disk."""
    for file in folder.glob("*.pth"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
