"""`cqlora serve` under load: clients that ask, stream, and hang up midway; errors, leaks and memory.

    python benchmarks/serve_load.py base=FOLDER [adapter=FOLDER …] \\
        [--clients 16] [--seconds 60] [--hang-up 0.42] [--max-tokens 64]

The server is a process of its own, started with the key=value arguments. Each client asks again as soon as
it is answered: prompts of several lengths, two thirds of the replies streamed; a share of the requests is
to be cut off by the client, and about a third is (some replies end sooner). Exit code 0 where no request
failed, every slot and place came back, and the server's memory did not grow from the load's second quarter
to its last by more than 5%.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import httpx
import psutil

WORDS = ["the", "model", "模型", "reads", "and", "writes", "中文", "text", "文本", "about", "training", "训练", "数据"]
FLAT = 1.05


@dataclass
class Load:
    """What the clients saw."""

    max_tokens: int
    hang_up: float
    most_words: int = 60
    answered: int = 0
    hung_up: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    first_text: list[float] = field(default_factory=list)
    """Seconds from a streamed request to its first characters."""
    memory: list[int] = field(default_factory=list)
    """Bytes, every half second."""


async def put_under_load(url: str, load: Load, clients: int, seconds: float, process: psutil.Process | None) -> None:
    """Let `clients` ask for `seconds`, and note the memory of `process` meanwhile."""
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client, asyncio.TaskGroup() as tasks:
        for number in range(clients):
            tasks.create_task(ask_again(client, load, random.Random(number), until))
        while process is not None and time.monotonic() < until:
            load.memory.append(process.memory_info().rss)
            await asyncio.sleep(0.5)


async def ask_again(client: httpx.AsyncClient, load: Load, dice: random.Random, until: float) -> None:
    """One client, until the time is over."""
    while time.monotonic() < until:
        words = " ".join(dice.choices(WORDS, k=dice.randint(1, load.most_words)))
        asked = {
            "messages": [{"role": "user", "content": words}],
            "max_tokens": dice.randint(4, load.max_tokens),
            "stream": dice.random() < 2 / 3,
        }
        leaves = dice.random() < load.hang_up
        try:
            await (stream if asked["stream"] else whole)(client, load, asked, leaves, dice)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            load.errors.append(repr(error))


async def stream(client: httpx.AsyncClient, load: Load, asked: dict, leaves: bool, dice: random.Random) -> None:
    """Read a stream to [DONE], or leave after a few parts of it."""
    stay = dice.randint(0, asked["max_tokens"] // 2) if leaves else asked["max_tokens"]
    asked = asked | {"stream_options": {"include_usage": True}}
    began = time.monotonic()
    parts, usage = 0, None
    async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                load.answered += 1
                load.tokens += usage["completion_tokens"]
                return
            if leaves and parts >= stay:
                load.hung_up += 1
                return
            event = json.loads(data) if data else {}
            if "error" in event:
                raise ValueError(event["error"]["message"])
            usage = event.get("usage", usage)
            if event.get("choices") and event["choices"][0]["delta"].get("content"):
                parts += 1
                if parts == 1:
                    load.first_text.append(time.monotonic() - began)
    raise ValueError("the stream ended without [DONE]")


async def whole(client: httpx.AsyncClient, load: Load, asked: dict, leaves: bool, dice: random.Random) -> None:
    """Wait for a whole reply, or for a moment only."""
    try:
        async with asyncio.timeout(dice.uniform(0.01, 1.0) if leaves else None):
            response = await client.post("/v1/chat/completions", json=asked)
    except TimeoutError:
        load.hung_up += 1
        return
    response.raise_for_status()
    load.answered += 1
    load.tokens += response.json()["usage"]["completion_tokens"]


async def read_metrics(url: str) -> dict[str, float]:
    """Every sample of /metrics by its name and labels."""
    async with httpx.AsyncClient(base_url=url) as client:
        lines = (await client.get("/metrics")).text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


async def wait_until_free(url: str, seconds: float = 10.0) -> tuple[float, float]:
    """Slots and places still taken when all are free, or when the time is over."""
    until = time.monotonic() + seconds
    while True:
        metrics = await read_metrics(url)
        taken = metrics["cqlora_slots_active"], metrics["cqlora_queue_waiting"]
        if taken == (0, 0) or time.monotonic() > until:
            return taken
        await asyncio.sleep(0.05)


def main() -> int:
    """Serve, load, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("serve", nargs="+", metavar="key=value")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--hang-up", type=float, default=0.42)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    load = Load(arguments.max_tokens, arguments.hang_up)
    command = [sys.executable, "-m", "cqlora.serve", *arguments.serve, "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split()[0]
            process = psutil.Process(server.pid)
            asyncio.run(put_under_load(url, load, arguments.clients, arguments.seconds, process))
            taken = asyncio.run(wait_until_free(url))
        finally:
            server.terminate()
        code = server.wait(timeout=60)
    return report(load, taken, code, arguments.seconds)


def report(load: Load, taken: tuple[float, float], code: int, seconds: float) -> int:
    """Print what happened; the exit code."""
    quarter = max(1, len(load.memory) // 4)
    second, last = (
        statistics.mean(part) / 2**20 for part in (load.memory[quarter : 2 * quarter], load.memory[-quarter:])
    )
    first = statistics.quantiles(load.first_text, n=20)
    print(f"answered {load.answered}, hung up {load.hung_up}, errors {len(load.errors)} {load.errors[:3]}")
    print(f"slots taken afterwards {taken[0]:.0f}, waiting {taken[1]:.0f}; the server's exit code {code}")
    print(f"{load.tokens / seconds:.1f} tokens/s of answered replies, not counting what was cut off")
    print(f"first text of a stream after {first[9]:.3f} s (median), {first[18]:.3f} (95th percentile)")
    print(
        f"memory {second:.1f} MiB in the second quarter, {last:.1f} in the last ({last / second:.4f}); "
        f"least {min(load.memory) / 2**20:.1f}, most {max(load.memory) / 2**20:.1f}"
    )
    held = not load.errors and taken == (0, 0) and code == 0 and last <= FLAT * second
    print("held" if held else "NOT held")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
