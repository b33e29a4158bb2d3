"""Preparation side by side: cqlora, TRL, LLaMA-Factory, a bare datasets.map; the same text and tokenizer.

    python benchmarks/prepare.py BASE TEXT.jsonl [TEXT.jsonl …] \\
        [--trl-python VENV/bin/python] [--llamafactory-python VENV/bin/python] \\
        [--copies 1] [--rounds 3] [--workers 2]

Each contender runs in a process of its own, alternating, from rows `{text}` in a file to sequences of
2,048 tokens on disk, with nothing cached. TRL and LLaMA-Factory run with `--workers` processes, and once
more with their default of one. Imports are not counted. Times are of the wall clock and of all processors
together; memory is the peak of the process tree. `--memory` compares cqlora's on one and on ten times the
text.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEQUENCE_LENGTH = 2048


def main() -> None:
    """Read the arguments; run every contender, or, in a child, the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--trl-python", default="")
    parser.add_argument("--llamafactory-python", default="")
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--contender", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        report(CONTENDERS[arguments.contender], arguments)
    elif arguments.memory:
        compare_memory(arguments)
    else:
        compare_speed(arguments)


def compare_speed(arguments: argparse.Namespace) -> None:
    """Alternate the contenders and print the best round of each, with the ratio to cqlora's."""
    pythons = {
        "cqlora": sys.executable,
        "trl": arguments.trl_python,
        "trl_one_process": arguments.trl_python,
        "llamafactory": arguments.llamafactory_python,
        "llamafactory_one_process": arguments.llamafactory_python,
        "datasets_map": sys.executable,
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name, python in pythons.items() if python}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.jsonl")
        write_rows(text, arguments.texts, arguments.copies)
        for _ in range(arguments.rounds):
            for name, done in runs.items():
                done.append(run_contender(name, pythons[name], arguments, text))
    print(f"{'':25} {'tokens':>12} {'wall s':>8} {'cpu s':>8} {'tokens/s':>10} {'peak MiB':>9} {'cqlora is':>10}")
    best = {name: min(done, key=lambda run: run["seconds"]) for name, done in runs.items()}
    rate = {name: run["tokens"] / run["seconds"] for name, run in best.items()}
    for name, run in best.items():
        ratio = f"{rate['cqlora'] / rate[name]:.2f}x"
        print(
            f"{name:25} {run['tokens']:12,.0f} {run['seconds']:8.2f} {run['cpu_seconds']:8.2f} "
            f"{rate[name]:10,.0f} {run['peak_mib']:9.0f} {ratio:>10}"
        )


def compare_memory(arguments: argparse.Namespace) -> None:
    """Print cqlora's peak memory on the text once and ten times over."""
    peaks = []
    for copies in (arguments.copies, 10 * arguments.copies):
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder, "text.jsonl")
            write_rows(text, arguments.texts, copies)
            run = run_contender("cqlora", sys.executable, arguments, text)
            size = text.stat().st_size / 2**20
            print(f"{size:8.1f} MiB of text: {run['tokens']:12,.0f} tokens, peak {run['peak_mib']:.0f} MiB")
            peaks.append(run["peak_mib"])
    print(f"ratio {peaks[1] / peaks[0]:.3f}")


def write_rows(file: Path, texts: list[Path], copies: int) -> None:
    """Rows `{text}`, title and text joined as cqlora does it; copies differ, so that none is a duplicate."""
    with file.open("w", encoding="utf-8") as stream:
        for copy in range(copies):
            for source in texts:
                for line in source.open(encoding="utf-8"):
                    row = json.loads(line)
                    text = "\n\n".join(part for part in (row.get("title"), row["text"]) if part)
                    stream.write(json.dumps({"text": f"{copy} {text}"}, ensure_ascii=False) + "\n")


def run_contender(name: str, python: str, arguments: argparse.Namespace, text: Path) -> dict[str, float]:
    """One contender in a fresh process and folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, __file__, str(arguments.base.resolve()), str(text), "--contender", name]
        environment = {
            **os.environ,
            "HF_HOME": folder,
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": folder,
            "DISABLE_VERSION_CHECK": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]) if python == sys.executable else "",
        }
        command += ["--workers", str(arguments.workers)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result


def report(prepare: Callable[[Path, Path, int], Callable[[], int]], arguments: argparse.Namespace) -> None:
    """In the child: import, then time the preparation, and print its figures as JSON."""
    work = prepare(arguments.base, arguments.texts[0], arguments.workers)
    peak = PeakMemory()
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    tokens = work()
    figures = {
        "tokens": tokens,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": sum(os.times()[:4]) - cpu,
        "peak_mib": peak.stop(),
    }
    print("\n" + json.dumps(figures))


class PeakMemory:
    """Samples the resident memory of this process and its children; shared pages are counted once each."""

    def __init__(self) -> None:
        self.peak = 0.0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        """Look every 50 ms."""
        import psutil

        tree = psutil.Process()
        while not self.stopped.wait(0.05):
            total = 0
            for process in [tree, *tree.children(recursive=True)]:
                try:
                    memory = process.memory_info()
                    total += memory.rss - (0 if process.pid == tree.pid else memory.shared)
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total / 2**20)

    def stop(self) -> float:
        """The peak in MiB."""
        self.stopped.set()
        self.thread.join()
        return self.peak


def prepare_cqlora(base: Path, text: Path, workers: int) -> Callable[[], int]:
    """cqlora: read, clean, deduplicate, encode, pack."""
    from cqlora.base import Base
    from cqlora.config.choices import SourceKind
    from cqlora.config.schema import DataConfig, HardwareConfig, ModelConfig, PretrainConfig, RunConfig, SourceConfig
    from cqlora.data.cache import prepare_cache

    shape = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), 8)
    config = RunConfig(
        model=ModelConfig(
            name="any",
            path=str(base),
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=SEQUENCE_LENGTH,
            **shape,
        ),
        data=DataConfig(
            root="",
            name="bench",
            sources={"text": SourceConfig(kind=SourceKind.wiki, path=str(text))},
            cache_dir="cache",
            workers=workers,
            val_fraction=0.0,
        ),
        stage=PretrainConfig(name="pretrain", sequence_length=SEQUENCE_LENGTH, global_batch_size=1),
        hardware=HardwareConfig(name="any"),
    )
    folder = Base(path=base, config={}, tokenizer_file=base / "tokenizer.json", first_added_row=None, added_rows=0)
    return lambda: prepare_cache(config, folder).splits["train"].tokens


def prepare_trl(base: Path, text: Path, workers: int | None) -> Callable[[], int]:
    """TRL: SFTTrainer's own preparation of a text column, packed."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model = LlamaForCausalLM(shape)
    settings = SFTConfig(
        output_dir="out",
        max_length=SEQUENCE_LENGTH,
        packing=True,
        dataset_num_proc=workers,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )

    def work() -> int:
        rows = load_dataset("json", data_files=str(text), split="train")
        trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
        return sum(map(len, trainer.train_dataset.data.column("input_ids").combine_chunks()))

    return work


def prepare_trl_one_process(base: Path, text: Path, workers: int) -> Callable[[], int]:
    """TRL as it comes: dataset_num_proc unset."""
    return prepare_trl(base, text, None)


def prepare_llamafactory(base: Path, text: Path, workers: int | None) -> Callable[[], int]:
    """LLaMA-Factory: its pretraining stage's preparation, packed."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    info = {"bench": {"file_name": text.name, "columns": {"prompt": "text"}}}
    (text.parent / "dataset_info.json").write_text(json.dumps(info))
    model_args, data_args, training_args, _, _ = get_train_args(
        {
            "stage": "pt",
            "do_train": True,
            "finetuning_type": "lora",
            "model_name_or_path": str(base),
            "dataset": "bench",
            "dataset_dir": str(text.parent),
            "template": "default",
            "cutoff_len": SEQUENCE_LENGTH,
            "packing": True,
            "preprocessing_num_workers": workers,
            "output_dir": "out",
            "use_cpu": True,
            "report_to": "none",
        }
    )
    tokenizers = load_tokenizer(model_args)

    def work() -> int:
        template = get_template_and_fix_tokenizer(tokenizers["tokenizer"], data_args)
        module = get_dataset(template, model_args, data_args, training_args, stage="pt", **tokenizers)
        return sum(map(len, module["train_dataset"].data.column("input_ids").combine_chunks()))

    return work


def prepare_llamafactory_one_process(base: Path, text: Path, workers: int) -> Callable[[], int]:
    """LLaMA-Factory as it comes: preprocessing_num_workers unset."""
    return prepare_llamafactory(base, text, None)


def prepare_datasets_map(base: Path, text: Path, workers: int) -> Callable[[], int]:
    """The least one can do: a batched datasets.map of the tokenizer, nothing cut, cleaned or packed."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return {"input_ids": tokenizer(batch["text"])["input_ids"]}

    def work() -> int:
        rows = load_dataset("json", data_files=str(text), split="train")
        encoded = rows.map(encode, batched=True, remove_columns=["text"], num_proc=workers)
        return sum(map(len, encoded.data.column("input_ids").combine_chunks()))

    return work


CONTENDERS: dict[str, Callable[[Path, Path, int], Callable[[], int]]] = {
    "cqlora": prepare_cqlora,
    "trl": prepare_trl,
    "trl_one_process": prepare_trl_one_process,
    "llamafactory": prepare_llamafactory,
    "llamafactory_one_process": prepare_llamafactory_one_process,
    "datasets_map": prepare_datasets_map,
}

if __name__ == "__main__":
    main()
