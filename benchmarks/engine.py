"""The engine beside transformers + PEFT on the same folders: an adapter on an NF4 base.

    python benchmarks/engine.py --base models/smollm2_135m --adapter outputs/sft/…/adapter
    python benchmarks/engine.py --base FOLDER --random-1b

Every measurement is a process of its own, and the sides take turns, so that whatever else the machine does falls
on all. PEFT is measured twice: as it comes, when nothing but NF4 is asked for, and at its best, with weights and
products in the dtype that this processor computes fastest in. In both bitsandbytes takes its fused bfloat16 kernel
where the processor has AVX512-BF16; `--no-bfloat16` measures all sides as on one that has it not, where bitsandbytes
unpacks the whole model for every token.

Without `--adapter` a random one of rank 16 on all linear layers is made for the base; `--random-1b` first writes a
random base of TinyLlama's shape (1.1 billion parameters) to `--base`. Ours is measured with a snapshot, which the
first load writes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cqlora.system.processor import SWITCH, Features, suits_bfloat16_matrices

SIDES = {"peft_default": "PEFT as it comes", "peft_best": "PEFT at its best"}
ROOT = Path(__file__).parent.parent
QUESTIONS = [
    "Tell me a long story about a river.", "Explain how bread is made, step by step.", "讲一个关于长江的故事。",
    "List twenty animals and where they live.", "Write a letter to a friend about autumn.",
    "How does a steam engine work? Explain at length.", "Describe a walk through an old city.",
    "What should I know before I learn to sail?",
]  # fmt: skip


def main() -> None:
    """Parse, run both sides in turn, print figures and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("models/smollm2_135m"))
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--random-1b", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--no-bfloat16", action="store_true")
    parser.add_argument("--worker", choices=["cqlora", *SIDES])
    options = parser.parse_args()
    if options.worker:
        print("MEASURED", json.dumps((run_cqlora if options.worker == "cqlora" else run_peft)(options)))
        return
    if options.random_1b and not options.base.exists():
        write_random_base(options.base)
    if options.adapter is None:
        options.adapter = options.base.with_name(f"{options.base.name}_adapter")
        if not options.adapter.exists():
            write_random_adapter(options.base, options.adapter)
    measure(options, "cqlora")  # writes the snapshot
    rounds = [{side: measure(options, side) for side in (*SIDES, "cqlora")} for _ in range(options.rounds)]
    report(rounds)


def measure(options: argparse.Namespace, side: str) -> dict[str, float]:
    """One side's figures from a fresh process."""
    command = [sys.executable, __file__, "--worker", side, "--base", str(options.base), "--adapter",
               str(options.adapter), "--tokens", str(options.tokens), "--dtype", options.dtype]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if options.no_bfloat16:
        command.append("--no-bfloat16")
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("MEASURED "))
    figures: dict[str, float] = json.loads(line.removeprefix("MEASURED "))
    figures["process"] = time.perf_counter() - started
    print(f"{side:12}", "  ".join(f"{name} {value:.2f}" for name, value in figures.items()), flush=True)
    return figures


def report(rounds: list[dict[str, dict[str, float]]]) -> None:
    """Figures, ratios within a round and what eight together bring: medians and spread."""
    for side in (*SIDES, "cqlora"):
        for name in ("first_token", "with_imports", "one", "eight"):
            print(f"{side:12} {name:12} {spread([sides[side][name] for sides in rounds])}")
        print(f"{side:12} eight / one  {spread([sides[side]['eight'] / sides[side]['one'] for sides in rounds])}")
    for side, meaning in SIDES.items():
        for name, theirs_first in (("first_token", True), ("with_imports", True), ("one", False), ("eight", False)):
            ratios = [sides["cqlora"][name] / sides[side][name] for sides in rounds]
            ratios = [1 / ratio if theirs_first else ratio for ratio in ratios]
            print(f"{name:12} {spread(ratios)} times {meaning}")


def spread(figures: list[float]) -> str:
    """The median, and the least and greatest."""
    return f"{statistics.median(figures):.2f} ({min(figures):.2f} to {max(figures):.2f})"


def summarise(
    answer: Callable[[list[str], int], int], tokens: int, started: float, imported: float
) -> dict[str, float]:
    """Seconds to the first token from nothing and after the imports; tokens/s of one conversation and of eight.

    `answer` generates for some questions at once and returns how many tokens came. The prompt's share is taken
    out of tokens/s by an answer of one token each.
    """
    answer(QUESTIONS[:1], 1)
    first = time.perf_counter()
    figures = {"imports": imported - started, "first_token": first - imported, "with_imports": first - started}
    for name, count in (("one", 1), ("eight", 8)):
        answer(QUESTIONS[:count], 2)
        counts, ends = [], [time.perf_counter()]
        for limit in (1, tokens):
            counts.append(answer(QUESTIONS[:count], limit))
            ends.append(time.perf_counter())
        prompt_seconds, all_seconds = ends[1] - ends[0], ends[2] - ends[1]
        figures[name] = (counts[1] - counts[0]) / (all_seconds - prompt_seconds)
    return figures


def run_cqlora(options: argparse.Namespace) -> dict[str, float]:
    """Our figures, greedy."""
    started = time.perf_counter()
    from cqlora.engine import LlamaEngine
    from cqlora.inference.requests import Sampling

    imported = time.perf_counter()
    if options.no_bfloat16:
        os.environ[SWITCH] = Features.plain.value
    # A random adapter has no card to say so.
    engine = LlamaEngine(options.adapter, options.base, quantization="nf4", dtype=options.dtype, cache=True)

    def answer(questions: list[str], limit: int) -> int:
        batch = engine.open_batch(len(questions))
        sampling = Sampling(max_new_tokens=limit, temperature=0, ignore_end=True)
        chats = [[{"role": "user", "text": question}] for question in questions]
        replies = [batch.admit(engine.encode_messages(chat), sampling) for chat in chats]
        while batch.free_slots < len(replies):
            batch.step()
        return sum(reply.completion_tokens for reply in replies)

    figures = summarise(answer, options.tokens, started, imported)
    print(engine.form)
    return figures


def run_peft(options: argparse.Namespace) -> dict[str, float]:
    """The figures of transformers' generate on PEFT's model, greedy, with its cache."""
    started = time.perf_counter()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    imported = time.perf_counter()
    if options.no_bfloat16:
        import bitsandbytes.nn.modules

        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    types = {}
    if options.worker == "peft_best":
        types["dtype"] = quantization["bnb_4bit_compute_dtype"] = peft_dtype(options)
    base = AutoModelForCausalLM.from_pretrained(
        options.base, quantization_config=BitsAndBytesConfig(**quantization), device_map={"": "cpu"}, **types
    )
    model = PeftModel.from_pretrained(base, options.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.base, padding_side="left")

    @torch.inference_mode()
    def answer(questions: list[str], limit: int) -> int:
        chats = [[{"role": "user", "content": question}] for question in questions]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        made = model.generate(**inputs, max_new_tokens=limit, min_new_tokens=limit, do_sample=False)
        return int(made[:, inputs["input_ids"].shape[1] :].numel())

    return summarise(answer, options.tokens, started, imported)


def peft_dtype(options: argparse.Namespace):
    """The dtype that the engine chooses too: bfloat16 where the processor has it."""
    import torch

    name = options.dtype
    if name == "auto":
        name = "bfloat16" if suits_bfloat16_matrices() and not options.no_bfloat16 else "float32"
    return getattr(torch, name)


def write_random_base(folder: Path) -> None:
    """A random model of TinyLlama's shape in bfloat16, with a tokenizer of the bundled sample."""
    import torch
    from transformers import LlamaForCausalLM

    from cqlora.config.schema import ModelConfig
    from cqlora.data.chat import CHAT_TEMPLATE
    from cqlora.data.sources import SAMPLE_DIR
    from cqlora.model.tiny import llama_config, read_sample_texts, train_tokenizer

    shape = ModelConfig(
        name="random_1b", path=str(folder), vocab_size=32_000, hidden_size=2048, intermediate_size=5632,
        num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    tokenizer = train_tokenizer(read_sample_texts(SAMPLE_DIR), shape.vocab_size)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(shape, bos_token_id=0, eos_token_id=0, pad_token_id=3)).bfloat16()
    model.save_pretrained(folder)


def write_random_adapter(base: Path, folder: Path) -> None:
    """A random adapter of rank 16 on all linear layers, as a run would write it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    config = adapted.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = str(base), True
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    tensors = {name: 0.01 * torch.randn(tensor.shape) for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
