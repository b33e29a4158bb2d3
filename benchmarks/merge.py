"""Time and memory of `cqlora merge` beside PEFT's `merge_and_unload`, in turn, on the same random model.

    python benchmarks/merge.py FOLDER [--shape 1.1B] [--repeat 3] [--alone] [--format gguf] [--onto nf4]

FOLDER takes the random base and adapter, which are written by streaming unless they are there; remove it
afterwards. Peak memory is the process's largest resident set, mapped files included, as the kernel counts it.
Both read the base, merge a rank-16 adapter on all linear layers, write bfloat16 safetensors and sync them;
importing is part of the time. `--alone` leaves PEFT out, for a model that it would not fit here.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from cqlora.config.schema import CONFIG_DIR
from cqlora.model.tiny import read_sample_texts, train_tokenizer
from cqlora.system.documents import write_json
from cqlora.system.shards import ShardReader, TensorSpec, split_rows, write_shards

ROOT = CONFIG_DIR.parent
SHAPES = {
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32},
}  # fmt: skip
VOCAB, RANK = 32_000, 16
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def main() -> None:
    """Write the model, run each way `--repeat` times in turn, compare the weights, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--format", default="safetensors")
    parser.add_argument("--onto", default="16bit")
    arguments = parser.parse_args()
    base, adapter = arguments.folder / "base", arguments.folder / "adapter"
    if not base.exists():
        write_base(base, SHAPES[arguments.shape])
        write_adapter(adapter, base)
    ways = {
        "cqlora": [
            sys.executable, "-m", "cqlora.merge", f"base={base}", f"adapter={adapter}",
            f"output_dir={arguments.folder / 'cqlora'}", f"format={arguments.format}", f"onto={arguments.onto}",
        ],
        "peft": [sys.executable, "-c", PEFT, str(base), str(adapter), str(arguments.folder / "peft")],
    }  # fmt: skip
    if arguments.alone:
        ways.pop("peft")
    runs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(arguments.repeat):
        for way, command in ways.items():
            shutil.rmtree(arguments.folder / way, ignore_errors=True)
            runs[way].append(run(command))
    print_table(runs)
    if not arguments.alone:
        print(compare(arguments.folder / "cqlora", arguments.folder / "peft"))
    for way in ways:
        shutil.rmtree(arguments.folder / way)


def run(command: list[str]) -> tuple[float, float]:
    """Seconds until the files are on the disk, and the largest resident set in GiB."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        raise SystemExit(f"{command} failed with {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def print_table(runs: dict[str, list[tuple[float, float]]]) -> None:
    """Median, fastest and slowest, and the ratios of the medians."""
    print(f"{'':10}{'median s':>10}{'fastest':>10}{'slowest':>10}{'peak GiB':>10}")
    medians = {}
    for way, figures in runs.items():
        seconds = sorted(figure[0] for figure in figures)
        medians[way] = (seconds[len(seconds) // 2], max(figure[1] for figure in figures))
        median, peak = medians[way]
        print(f"{way:10}{median:10.1f}{seconds[0]:10.1f}{seconds[-1]:10.1f}{peak:10.2f}")
    if "peft" in medians:
        time_ratio, memory_ratio = (mine / its for mine, its in zip(medians["cqlora"], medians["peft"], strict=True))
        print(f"cqlora takes {time_ratio:.2f} of PEFT's time and {memory_ratio:.2f} of its memory")


def write_base(folder: Path, shape: dict[str, int]) -> None:
    """A random LLaMA in bfloat16, a block of numbers repeated, never whole in memory."""
    folder.mkdir(parents=True)
    numbers = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def produce(spec: TensorSpec) -> Iterator[torch.Tensor]:
        columns = spec.shape[-1]
        step = len(numbers) // columns if len(spec.shape) == 2 else spec.shape[0]
        for start in range(0, spec.shape[0], step):
            rows = min(step, spec.shape[0] - start)
            yield numbers[: rows * columns].view(rows, columns) if len(spec.shape) == 2 else 1 + numbers[:rows]

    write_shards(folder, base_specs(shape), produce)
    tokenizer = train_tokenizer(read_sample_texts(ROOT / "cqlora" / "data" / "sample"), 2000)
    tokenizer.save_pretrained(folder)
    common = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "dtype": "bfloat16"}
    rest = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": False}
    write_json(folder / "config.json", common | rest | shape)


def base_specs(shape: dict[str, int]) -> list[TensorSpec]:
    """Names and shapes of the base's tensors."""
    hidden = shape["hidden_size"]
    specs = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)}
    for layer in range(shape["num_hidden_layers"]):
        place = f"model.layers.{layer}"
        specs |= {f"{place}.{name}.weight": size for name, size in layer_shapes(shape).items()}
        specs |= {f"{place}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    specs["lm_head.weight"] = (VOCAB, hidden)
    return [TensorSpec(name, "BF16", size) for name, size in specs.items()]


def layer_shapes(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Shapes of one block's linear layers."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }


def write_adapter(folder: Path, base: Path) -> None:
    """A random adapter on all linear layers of the base's blocks."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, spec in ShardReader(base).specs.items():
        if name.endswith("_proj.weight"):
            place = f"base_model.model.{name.removesuffix('.weight')}"
            state[f"{place}.lora_A.weight"] = torch.randn(RANK, spec.shape[1], generator=generator) * 0.02
            state[f"{place}.lora_B.weight"] = torch.randn(spec.shape[0], RANK, generator=generator) * 0.02
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=32, target_modules="all-linear").save_pretrained(folder)


def compare(ours: Path, theirs: Path) -> str:
    """How many numbers differ, and the largest difference beside the larger of the two numbers."""
    mine, its = ShardReader(ours), ShardReader(theirs)
    assert mine.specs.keys() == its.specs.keys(), "the two models hold other tensors"
    differing = total = 0
    largest = 0.0
    for name in mine.specs:
        for left, right in zip(split_rows(mine.read(name)), split_rows(its.read(name)), strict=True):
            apart = (left.float() - right.float()).abs()
            differing, total = differing + int((apart > 0).sum()), total + apart.numel()
            scale = torch.maximum(left.float().abs(), right.float().abs()).clamp(min=1e-30)
            largest = max(largest, float((apart / scale).max()))
    return (
        f"{differing:,} of {total:,} numbers differ, the most by {largest:.2%} (one step of bfloat16 is 0.39% to 0.78%)"
    )


if __name__ == "__main__":
    main()
