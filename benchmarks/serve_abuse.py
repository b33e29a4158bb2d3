"""`cqlora serve` under abuse: what /health takes meanwhile, and what memory is left behind.

    python benchmarks/serve_abuse.py base=FOLDER [adapter=FOLDER …] [--seconds 60]

The server is a process of its own, started with the key=value arguments. While /health is asked ten times a
second, beside the bare server of benchmarks/health.py, these follow each other: 16 clients who ask and hang up,
bodies of 4 MB that are made to be costly, bodies of as many messages and as long texts as are allowed, 500
connections that send a byte now and then.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable

import httpx
import psutil

from benchmarks.health import watching
from benchmarks.serve_load import Load, put_under_load

COSTLY = [
    b'{"messages": [' + b"1," * 1_999_990 + b"1]}",
    b'{"messages": [' + b"[]," * 1_300_000 + b"[]]}",
    b"{" + b'"":1,' * 800_000 + b'"":1}',
    b'{"prompt": "' + b"\\\\" * 2_090_000 + b'"}',
]
ALLOWED = [
    json.dumps({"messages": [{"role": "user", "content": "a"}] * 4000}).encode(),
    json.dumps({"prompt": "模型" * 30_000, "max_tokens": 1}).encode(),
    json.dumps({"prompt": "a" * 400_000, "max_tokens": 1}).encode(),
    json.dumps({"messages": [{"role": "user", "content": [1] * 12_000}] * 4}).encode(),
]


async def send(url: str, bodies: list[bytes], times: int) -> None:
    """Each body several times, four at once."""
    gate = asyncio.Semaphore(4)
    headers = {"Content-Type": "application/json"}

    async def once(client: httpx.AsyncClient, body: bytes) -> None:
        async with gate:
            try:
                await client.post("/v1/chat/completions", content=body, headers=headers)
                await client.post("/v1/completions", content=body, headers=headers)
            except httpx.TransportError:
                pass  # closed while the body was still being sent

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*(once(client, body) for body in bodies * times))


async def crawl(url: str, connections: int, seconds: float) -> None:
    """Open connections that send a header's byte a second."""
    host, port = url.removeprefix("http://").split(":")

    async def one() -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(b"POST /v1/completions HTTP/1.1\r\nX-Slow: ")
                while time.monotonic() < until:
                    writer.write(b"a")
                    await writer.drain()
                    await asyncio.sleep(1)
                writer.close()
            except OSError:
                await asyncio.sleep(0.5)

    await asyncio.gather(*(one() for _ in range(connections)))


async def measure(what: str, work: Awaitable[None], url: str, process: psutil.Process) -> None:
    """Do the work beside /health, and print what both took."""
    began, processor = time.monotonic(), sum(process.cpu_times()[:2])
    with watching(url) as answers:
        await work
        took, used = time.monotonic() - began, sum(process.cpu_times()[:2]) - processor
    print(
        f"{what}: {took:.1f} s, {used:.1f} s of the server's processor; {answers}; "
        f"memory {process.memory_info().rss / 2**20:.0f} MiB",
        flush=True,
    )


async def abuse(url: str, process: psutil.Process, seconds: float) -> None:
    """All of it, one after the other."""
    load = Load(max_tokens=64, hang_up=0.42)
    await measure("nothing", asyncio.sleep(10), url, process)
    await measure("16 clients", put_under_load(url, load, 16, seconds, process), url, process)
    quarter = len(load.memory) // 4
    print(f"  memory by quarter {[max(load.memory[n * quarter :][:quarter]) >> 20 for n in range(4)]} MiB", flush=True)
    print(f"  answered {load.answered}, hung up {load.hung_up}, errors {load.errors[:3]}")
    await measure("4 MB bodies", send(url, COSTLY, 5), url, process)
    await measure("bodies as large as allowed", send(url, ALLOWED, 5), url, process)
    await measure("500 slow connections", crawl(url, 500, seconds / 2), url, process)
    await measure("nothing", asyncio.sleep(10), url, process)


def main() -> int:
    """Serve, abuse, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("serve", nargs="+", metavar="key=value")
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "cqlora.serve", *arguments.serve, "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split()[0]
            asyncio.run(abuse(url, psutil.Process(server.pid), arguments.seconds))
        finally:
            server.terminate()
        return server.wait(timeout=60)


if __name__ == "__main__":
    sys.exit(main())
