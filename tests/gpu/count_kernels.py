"""How many kernels a micro batch of 7B in a pack of 2,048 tokens asks of a GPU, forward and in all, and how many casts.

python -m tests.gpu.count_kernels [--blocks N] [OVERRIDE …]

What a run's own modules dispatch is counted on a GPU that is not there, by operator. A kernel that is started past
torch's dispatcher is not seen and has no fake tensors to work on: register it (torch.library.custom_op, with
register_fake), and it counts one, whatever it does.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.gpu.guard import fake_gpu_environment

if TYPE_CHECKING:
    from tests.gpu.meter import Meter

BLOCKS = 32
"""Of 7B."""
SEVEN_B = (
    "model=llama_7b",
    "hardware=1xa100",
    "hardware.micro_batch_size=1",
    "hardware.activation_checkpointing=none",
    "lora.rank=64",
)


@dataclass(frozen=True)
class Kernels:
    """Of one micro batch."""

    forward: int
    total: int
    """Forward and backward."""
    casts: int
    """Of the total, those that only change a type."""
    operators: Counter[str]
    """The total by operator."""

    def extend(self, more: "Kernels", times: int) -> "Kernels":
        """These, and `times` as often what `more` has beyond them."""

        def reach(own: int, others: int) -> int:
            return own + times * (others - own)

        names = self.operators.keys() | more.operators.keys()
        return Kernels(
            *(reach(getattr(self, name), getattr(more, name)) for name in ("forward", "total", "casts")),
            Counter({name: reach(self.operators[name], more.operators[name]) for name in names}),
        )


def count_kernels(*overrides: str, blocks: int = BLOCKS) -> Kernels:
    """Count in this process, which needs `guard.fake_gpu_environment`, and is of no use for anything else afterwards.

    Every block asks for the same, so two small models tell it of one with any number of `blocks`.
    """
    from tests.gpu.fake_gpu import Card
    from tests.gpu.fake_step import fake_gpus
    from tests.gpu.meter import Meter

    meter = Meter()
    with fake_gpus(Card(), meter):
        one, two = (count_micro_batch(meter, *overrides, f"model.num_hidden_layers={number}") for number in (1, 2))
    return one.extend(two, blocks - 1)


def count_micro_batch(meter: "Meter", *overrides: str) -> Kernels:
    """Kernels of the first micro batch of a step."""
    from tests.gpu.step import build_module, compose_hollow, take_micro_batch

    forward: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        config = compose_hollow(Path(folder), *SEVEN_B, *overrides)
        module, _ = build_module(config)
        meter.restart()
        take_micro_batch(config, module, lambda: forward.append(meter.kernels.total()))
    return Kernels(forward[0], meter.kernels.total(), meter.casts, Counter(meter.kernels))


def main() -> None:
    """Start again with a GPU that is not there, count, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--operators", type=int, default=20, help="how many of the most frequent operators to list")
    options, overrides = parser.parse_known_args()
    if "fake_cuda" not in os.environ.get("LD_PRELOAD", ""):
        environment = fake_gpu_environment(Path(tempfile.gettempdir(), "cqlora-fake-cuda"))
        os.execve(sys.executable, [sys.executable, "-m", "tests.gpu.count_kernels", *sys.argv[1:]], environment)
    found = count_kernels(*overrides, blocks=options.blocks)
    print(f"kernels forward {found.forward:,}, forward and backward {found.total:,}; of them casts {found.casts:,}")
    for name, times in found.operators.most_common(options.operators):
        print(f"  {times:6,}  {name}")


if __name__ == "__main__":
    main()
