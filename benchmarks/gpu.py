"""QLoRA of one model on this machine's first GPU beside other programs: tokens/s, peak memory, share of peak FLOP/s.

    python benchmarks/gpu.py --model models/llama2_7b --llamafactory LF/bin --trl TRL/bin --unsloth UNSLOTH/bin

Each option names the `bin` of an environment in which that program is installed; those without one are left out.
Every program trains on the same rows, each of which fills a pack of `--length` tokens with one document, in NF4 with
double quantisation and bfloat16, LoRA of `--rank` on all linear layers without dropout, PyTorch's or its own AdamW.
Each runs twice, for 10 and for 30 steps: the difference is 20 steps without loading, compiling or saving, whatever a
program logs. Memory is what the driver shows, sampled. `--dry-run` prints each command and says what is missing.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
SHORT, LONG = 10, 30
"""Steps of a program's two runs."""
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "4090": 165.0, "3090": 71.0}
"""Dense bfloat16 by NVIDIA's data sheets, by what nvidia-smi calls a GPU."""


@dataclass(frozen=True)
class Task:
    """What every program does."""

    model: Path
    rows: Path
    folder: Path
    length: int
    packs: int
    """In a step."""
    rank: int
    checkpointing: bool
    steps: int = LONG


@dataclass(frozen=True)
class Program:
    """Another program or cqlora: where it is, and its command for a task."""

    name: str
    executable: Path
    install: str
    command: Callable[[Path, Task], list[str]]


def main(arguments: list[str] | None = None) -> int:
    """Print the commands, or run them and print the table."""
    options = parse(arguments)
    task = Task(
        options.model, options.folder / "rows.jsonl", options.folder, options.length, options.packs, options.rank,
        options.checkpointing,
    )  # fmt: skip
    programs = list(list_programs(options))
    if options.dry_run:
        return tell(programs, task)
    options.folder.mkdir(parents=True, exist_ok=True)
    write_rows(task)
    flops = count_flops_per_token(task)
    peak = 1e12 * (options.peak_tflops or find_peak_tflops())
    print(f"| program | tokens/s | peak GiB | share of {peak / 1e12:.0f} TFLOP/s |\n|---|---|---|---|", flush=True)
    for program in programs:
        speed, memory = measure(program, task)
        print(f"| {program.name} | {speed:,.0f} | {memory:.1f} | {speed * flops / peak:.0%} |", flush=True)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/benchmark_gpu"), help="where everything is written"
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--packs", type=int, default=4, help="packs of a step, all in one micro batch")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, in every program")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU, where its name is none of those known here")
    parser.add_argument("--llamafactory", type=Path, help="bin of an environment")
    parser.add_argument("--trl", type=Path, help="bin of an environment")
    parser.add_argument("--unsloth", type=Path, help="bin of an environment")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args(arguments)


def list_programs(options: argparse.Namespace) -> Iterator[Program]:
    """cqlora with and without its kernels, and every other whose environment is named."""
    own = Path(sys.executable)
    yield Program("cqlora", own, "", lambda program, task: cqlora(program, task, "auto"))
    yield Program("cqlora, plain", own, "", lambda program, task: cqlora(program, task, "plain"))
    if options.llamafactory:
        path, install = options.llamafactory / "llamafactory-cli", "pip install llamafactory bitsandbytes liger-kernel"
        yield Program("LLaMA-Factory", path, install, lambda program, task: llamafactory(program, task, False))
        yield Program("LLaMA-Factory, Liger", path, install, lambda program, task: llamafactory(program, task, True))
    if options.trl:
        install = "pip install trl peft bitsandbytes liger-kernel"
        yield Program("TRL, Liger", options.trl / "trl", install, trl)
    if options.unsloth:
        yield Program("unsloth", options.unsloth / "python", "pip install unsloth", unsloth)


def cqlora(program: Path, task: Task, kernels: str) -> list[str]:
    """This project's command."""
    checkpointing = "full" if task.checkpointing else "none"
    return [
        str(program), "-m", "cqlora.run", "stage=pretrain", "model=auto", f"model.path={task.model.resolve()}",
        "data=text", f"data.sources.text.path={task.rows.resolve()}", "data.sources.text.language=mixed",
        "data.clean.deduplicate=none", "data.clean.drop_repeated_lines=false", "data.val_fraction=0",
        "hardware=auto", "hardware.precision=bfloat16", f"hardware.kernels={kernels}",
        f"hardware.micro_batch_size={task.packs}", f"hardware.activation_checkpointing={checkpointing}",
        f"stage.global_batch_size={task.packs}", f"stage.sequence_length={task.length}", "stage.epochs=null",
        f"stage.max_steps={task.steps}", "stage.checkpoint_every_steps=1000", "stage.resume=never",
        f"lora.rank={task.rank}", f"lora.alpha={task.rank}", "tracking=none",
        f"hydra.run.dir={task.folder.resolve()}/cqlora-{kernels}-{task.steps}",
    ]  # fmt: skip


def llamafactory(program: Path, task: Task, liger: bool) -> list[str]:
    """LLaMA-Factory's: continued pretraining, which cuts the text into packs itself."""
    dataset = {"rows": {"file_name": str(task.rows.resolve()), "columns": {"prompt": "text"}}}
    write_json(dataset, task.folder / "dataset_info.json")
    settings = {
        **common_settings(task, f"llamafactory-{'liger-' * liger}{task.steps}"),
        "stage": "pt", "do_train": True, "finetuning_type": "lora", "lora_target": "all", "lora_rank": task.rank,
        "lora_alpha": task.rank, "lora_dropout": 0.0, "quantization_bit": 4, "quantization_method": "bnb",
        "double_quantization": True, "dataset": "rows", "dataset_dir": str(task.folder.resolve()),
        "cutoff_len": task.length, "flash_attn": "auto", "enable_liger_kernel": liger,
        "disable_gradient_checkpointing": not task.checkpointing, "overwrite_cache": True,
    }  # fmt: skip
    return [str(program), "train", write_yaml(settings, task.folder / f"llamafactory-{liger}-{task.steps}.yaml")]


def trl(program: Path, task: Task) -> list[str]:
    """TRL's: rows are cut to the length of a pack."""
    settings = {
        **common_settings(task, f"trl-{task.steps}"),
        "use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": True, "lora_r": task.rank,
        "lora_alpha": task.rank, "lora_dropout": 0.0, "lora_target_modules": "all-linear", "dtype": "bfloat16",
        "max_length": task.length, "use_liger_kernel": True, "gradient_checkpointing": task.checkpointing,
        "datasets": [{"path": "json", "data_files": str(task.rows.resolve())}],
    }  # fmt: skip
    return [str(program), "sft", "--config", write_yaml(settings, task.folder / f"trl-{task.steps}.yaml")]


def unsloth(program: Path, task: Task) -> list[str]:
    """unsloth's has no command line of its own: a worker in its environment."""
    settings = common_settings(task, f"unsloth-{task.steps}") | {"length": task.length, "rank": task.rank}
    settings |= {"rows": str(task.rows.resolve()), "checkpointing": task.checkpointing}
    worker = Path(__file__).with_name("gpu_unsloth.py")
    return [str(program), str(worker), write_json(settings, task.folder / f"unsloth-{task.steps}.json")]


def common_settings(task: Task, name: str) -> dict[str, Any]:
    """What transformers' Trainer, which the others build on, is told by each of them."""
    return {
        "model_name_or_path": str(task.model.resolve()), "output_dir": f"{task.folder.resolve()}/{name}",
        "per_device_train_batch_size": task.packs, "gradient_accumulation_steps": 1, "max_steps": task.steps,
        "learning_rate": 1e-4, "bf16": True, "logging_steps": task.steps, "save_strategy": "no", "report_to": "none",
    }  # fmt: skip


def write_json(values: Any, file: Path) -> str:
    """Write `values` and return the file's path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return str(file.resolve())


def write_yaml(values: dict[str, Any], file: Path) -> str:
    """Write `values` and return the file's path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return str(file.resolve())


def tell(programs: list[Program], task: Task) -> int:
    """Print each program's command, and whether the program is there; 3 where one is missing."""
    missing = [program for program in programs if not program.executable.is_file()]
    for program in programs:
        print(f"# {program.name}\n{shlex.join(program.command(program.executable, task))}")
    for program in missing:
        print(f"{program.name}: {program.executable} is not there; type `{program.install}` in its environment.")
    return 3 if missing else 0


def write_rows(task: Task) -> None:
    """Rows of the bundled sample, each longer than a pack and begun at another place, as many as the steps take."""
    from cqlora.data.sources import SAMPLE_DIR
    from cqlora.model.tiny import read_sample_texts

    text = "\n".join(read_sample_texts(SAMPLE_DIR))
    size = 8 * task.length
    text *= 1 + 2 * size // len(text)
    with task.rows.open("w", encoding="utf-8") as file:
        for number in range((LONG + 2) * task.packs):
            start = number * 997 % (len(text) - size)
            file.write(json.dumps({"text": text[start : start + size]}, ensure_ascii=False) + "\n")


def count_flops_per_token(task: Task) -> float:
    """Operations that the model needs for a token, forward and backward; what is computed again counts once."""
    from hydra import compose, initialize_config_dir

    from cqlora.config.choices import Checkpointing
    from cqlora.config.diagnosis import to_schema
    from cqlora.config.schema import CONFIG_DIR, RunConfig, register_schemas
    from cqlora.launch.settle import look_ahead, settle
    from cqlora.plan.time import flops_per_token
    from cqlora.plan.workload import describe_run

    register_schemas()
    overrides = [each for each in cqlora(Path(sys.executable), task, "auto")[3:] if not each.startswith("hydra.")]
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        config = to_schema(compose("config", overrides), RunConfig)
    work = describe_run(settle(config, look_ahead(config)))
    return flops_per_token(replace(work, checkpointing=Checkpointing.none))


def find_peak_tflops() -> float:
    """The published throughput of the GPU.

    Raises:
        SystemExit: it is none of those known here.
    """
    name = ask_driver("name")
    for known, tflops in PEAK_TFLOPS.items():
        if known in name:
            return tflops
    raise SystemExit(f"the throughput of {name} is not known here; give it with --peak-tflops.")


def name_gpu() -> str:
    """The one GPU of every program, by number or UUID: the first that may be used."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip() or "0"


def environment() -> dict[str, str]:
    """A program's: the others would take every GPU that they see, and CUDA would number them by speed."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": name_gpu(), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def ask_driver(what: str) -> str:
    """What nvidia-smi tells of the GPU."""
    query = ["nvidia-smi", "-i", name_gpu(), f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def measure(program: Program, task: Task) -> tuple[float, float]:
    """Tokens a second over the steps that the longer run has more, and the peak of memory in GiB."""
    seconds, peaks = [], []
    for steps in (SHORT, LONG):
        took, peak = run(program, replace(task, steps=steps))
        seconds.append(took)
        peaks.append(peak)
    return (LONG - SHORT) * task.packs * task.length / (seconds[1] - seconds[0]), max(peaks)


def run(program: Program, task: Task) -> tuple[float, float]:
    """Seconds and peak GiB of one run, whose output goes to a file."""
    log = task.folder / f"{program.name.replace(', ', '-')}-{task.steps}.log"
    with log.open("w") as output:
        started = time.monotonic()
        worker = subprocess.Popen(
            program.command(program.executable, task),
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(),
        )
        peaks = [0.0]
        watcher = threading.Thread(target=watch_memory, args=(worker, peaks))
        watcher.start()
        code = worker.wait()
        took = time.monotonic() - started
        watcher.join()
    if code:
        raise SystemExit(f"{program.name} ended with {code}; its output is in {log}.")
    return took, peaks[0]


def watch_memory(worker: "subprocess.Popen[bytes]", peaks: list[float]) -> None:
    """Keep the most that the driver shows as used while `worker` runs."""
    while worker.poll() is None:
        peaks[0] = max(peaks[0], float(ask_driver("memory.used")) / 1024)
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
