"""Write random weights in Meta's layout, of any published shape, holding little of them in memory.

python benchmarks/meta_weights.py 7B FOLDER [--tokenizer FILE]
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

SHAPES = {
    "160M": {"dim": 768, "n_layers": 12, "n_heads": 12, "hidden": 2048, "ranks": 1},
    "1B": {"dim": 2048, "n_layers": 16, "n_heads": 32, "hidden": 5632, "ranks": 1},
    "7B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "hidden": 11008, "ranks": 1},
    "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40, "hidden": 13824, "ranks": 2},
    "65B": {"dim": 8192, "n_layers": 80, "n_heads": 64, "hidden": 22016, "ranks": 8},
}
VOCAB = 32_000
_BLOCK_NUMBERS = 1 << 24


def write_weights(size: str, folder: Path, tokenizer: Path | None) -> None:
    """Write params.json, the consolidated files in float16, and a tokenizer.model."""
    shape = SHAPES[size]
    folder.mkdir(parents=True)
    params = {key: shape[key] for key in ("dim", "n_layers", "n_heads")}
    params |= {"multiple_of": 256, "norm_eps": 1e-06, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(shape["ranks"]):
        numbers = (torch.randn(_BLOCK_NUMBERS) * 0.02).half()
        state = {name: random_tensor(folder / name, size, numbers) for name, size in rank_tensors(shape)}
        torch.save(state, folder / f"consolidated.{rank:02}.pth")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")


def rank_tensors(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one rank's tensors."""
    dim, ranks, hidden = shape["dim"], shape["ranks"], shape["hidden"] // shape["ranks"]
    yield "tok_embeddings.weight", (VOCAB, dim // ranks)
    yield "norm.weight", (dim,)
    yield "output.weight", (VOCAB // ranks, dim)
    for layer in range(shape["n_layers"]):
        yield from (
            (f"layers.{layer}.{name}.weight", size)
            for name, size in {
                "attention.wq": (dim // ranks, dim),
                "attention.wk": (dim // ranks, dim),
                "attention.wv": (dim // ranks, dim),
                "attention.wo": (dim, dim // ranks),
                "feed_forward.w1": (hidden, dim),
                "feed_forward.w2": (dim, hidden),
                "feed_forward.w3": (hidden, dim),
                "attention_norm": (dim,),
                "ffn_norm": (dim,),
            }.items()
        )


def random_tensor(file: Path, size: tuple[int, ...], numbers: torch.Tensor) -> torch.Tensor:
    """`numbers`, repeated, in a mapped file, so that torch.save needs no memory of the tensor's size."""
    flat = torch.from_file(str(file), shared=True, size=torch.Size(size).numel(), dtype=torch.float16)
    for block in flat.split(len(numbers)):
        block.copy_(numbers[: len(block)])
    # The mapping keeps the bytes reachable until the tensor is gone.
    file.unlink()
    return flat.view(size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    arguments = parser.parse_args()
    write_weights(arguments.size, arguments.folder, arguments.tokenizer)
