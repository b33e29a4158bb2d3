"""A training step beside TRL: 1,024 packed tokens, NF4, LoRA rank 16 on all linear layers, no checkpointing.

    python benchmarks/train_step.py --trl-python TRL_VENV/bin/python --model models/smollm2_135m

Both train in a process of their own, at once loaded and then stepping in turn, so that whatever else the machine does
falls on both. TRL's environment: `pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 peft==0.21.2
bitsandbytes==0.50.2 datasets==5.2.0`.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

TOKENS = 1024
ROOT = Path(__file__).parent.parent


def main() -> None:
    """Parse, run both in turn, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--model", default="models/smollm2_135m")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--worker", choices=["cqlora", "trl"])
    options = parser.parse_args()
    if options.worker:
        {"cqlora": train_with_cqlora, "trl": train_with_trl}[options.worker](options)
        return
    seconds, memory, share = alternate(options)
    report(seconds, memory, share)


def alternate(options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float], float]:
    """Seconds of every measured step and peak memory in GiB of each side, and our share of the product limit."""
    workers = {
        name: subprocess.Popen(
            [python, __file__, "--worker", name, "--model", options.model, "--precision", options.precision],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for name, python in (("trl", options.trl_python), ("cqlora", sys.executable))
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    memory, share = {}, 0.0
    for number in range(options.steps + 1):
        for name, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            figures = next(line for line in worker.stdout if line.startswith("STEP ")).split()
            memory[name] = float(figures[2])
            if number:  # the first step warms up
                seconds[name].append(float(figures[1]))
                share = float(figures[3]) if name == "cqlora" else share
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return seconds, memory, share


def report(seconds: dict[str, list[float]], memory: dict[str, float], share: float) -> None:
    """Tokens per second, peak memory, and the two ratios."""
    for name, taken in seconds.items():
        each = " ".join(f"{value:.2f}" for value in taken)
        print(f"{name:7} {TOKENS / statistics.median(taken):7.1f} tokens/s  {memory[name]:5.2f} GiB   s/step: {each}")
    ratios = [theirs / ours for ours, theirs in zip(seconds["cqlora"], seconds["trl"], strict=True)]
    print(f"speed   {statistics.median(ratios):.2f} times TRL's (pairs {min(ratios):.2f} to {max(ratios):.2f})")
    print(f"memory  {memory['cqlora'] / memory['trl']:.2f} of TRL's peak")
    print(f"cqlora's last step ran at {share:.0%} of the measured matrix-product limit")


def wait_and_time(step) -> None:
    """Take a step for each line on stdin and tell how long it took and the peak memory."""
    for _ in sys.stdin:
        started = time.perf_counter()
        share = step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"STEP {time.perf_counter() - started:.4f} {peak:.4f} {share:.4f}", flush=True)


def train_with_cqlora(options: argparse.Namespace) -> None:
    """Our objective and optimizer on four documents of 256 tokens, 60% of them labels."""
    import torch

    from cqlora.base import read_base
    from cqlora.config.choices import Device, Embeddings
    from cqlora.config.schema import HardwareConfig, LoraConfig, PretrainConfig
    from cqlora.model.adapters import attach_adapter
    from cqlora.model.batch import build_batch
    from cqlora.model.fused import fuse_blocks
    from cqlora.model.load import load_base
    from cqlora.model.objective import Objective
    from cqlora.model.throughput import count_flops_per_token, measure_matmul_flops
    from cqlora.train.optimizer import build_optimizer

    base, device, dtype = read_base(options.model), torch.device("cpu"), getattr(torch, options.precision)
    model = load_base(base, model_config(base), HardwareConfig(name="cpu", device=Device.cpu), device, dtype)
    model = attach_adapter(model, base, LoraConfig(rank=16, alpha=16), Embeddings.frozen, "")
    objective = Objective(model, dtype, autocast=not fuse_blocks(model)).train()
    stage = PretrainConfig(name="pretrain", sequence_length=2048, global_batch_size=1)
    optimizer = build_optimizer(objective, stage)
    trained = [p for p in objective.parameters() if p.requires_grad]
    flops = count_flops_per_token(model)
    limit = 0.0

    def step() -> float:
        nonlocal limit
        # In our first turn, the second of all: the other side has loaded, stepped, and waits.
        limit = limit or measure_matmul_flops(device, dtype, seconds=1.0)
        started = time.perf_counter()
        batch = build_batch([random_pack()], device)
        labels = len(batch.targets)
        loss, _ = objective(batch, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return (flops[0] * TOKENS + flops[1] * labels) / (time.perf_counter() - started) / limit

    wait_and_time(step)


def model_config(base):
    """The configuration of the folder's own shape."""
    from cqlora.config.choices import Attention
    from cqlora.config.schema import ModelConfig

    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings")  # fmt: skip
    shape = {key: base.config[key] for key in keys}
    return ModelConfig(name="base", path=str(base.path), attention=Attention.documents, **shape)


def random_pack():
    """Four documents of 256 random tokens; the first 40% of each are a prompt."""
    import numpy as np

    from cqlora.data.store import Pack

    mask = np.tile(np.arange(256) >= 102, 4)
    tokens = np.random.default_rng(0).integers(100, 40_000, TOKENS)
    return Pack(
        token_ids=tokens, label_mask=mask, document_lengths=[256] * 4, source_ids=[0] * 4, characters=[256] * 4,
        bytes=[256] * 4,
    )  # fmt: skip


def train_with_trl(options: argparse.Namespace) -> None:
    """SFTTrainer with packing on the same tokens, held at each step until it is asked for."""
    import numpy as np
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    dtype = getattr(torch, options.precision)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, quantization_config=quantized)
    tokens = np.random.default_rng(0).integers(100, 40_000, TOKENS).reshape(4, 256)
    mask = (np.arange(256) >= 102).astype(int).tolist()
    rows = [{"input_ids": row.tolist(), "completion_mask": mask} for _ in range(64) for row in tokens]

    class Turn(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *arguments, **options) -> None:
            if not sys.stdin.readline():
                sys.exit(0)
            self.started = time.perf_counter()

        def on_step_end(self, *arguments, **options) -> None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"STEP {time.perf_counter() - self.started:.4f} {peak:.4f} 0", flush=True)

    settings = SFTConfig(
        output_dir="/tmp/trl-benchmark", packing=True, max_length=TOKENS, per_device_train_batch_size=1, max_steps=100,
        gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no", use_cpu=True,
        bf16=options.precision == "bfloat16", optim="adamw_torch", max_grad_norm=1.0, completion_only_loss=True,
        dataset_num_proc=None, disable_tqdm=True,
    )  # fmt: skip
    SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Turn()],
    ).train()  # fmt: skip


if __name__ == "__main__":
    main()
