"""What the planner says beside what others published, and beside runs on this machine.

python benchmarks/plan_accuracy.py            the published tables
python benchmarks/plan_accuracy.py --cpu DIR  runs on this machine's processor, in folders under DIR
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from cqlora.config.choices import Checkpointing, Quantization, Strategy
from cqlora.config.schema import HardwareConfig, LoraConfig, ModelConfig
from cqlora.plan.estimate import GIB, Estimate, estimate
from cqlora.plan.fit import Fit, judge_fit, squeeze
from cqlora.plan.program import Program
from cqlora.plan.time import find_speed, micro_step_seconds
from cqlora.plan.workload import Workload

ROWS_FILE = Path(__file__).with_name("plan_accuracy_rows.yaml")
SAMPLES_TIMED = 1024
"""Packs that fsdp_qlora's times are for."""
UNITS = {"GiB": GIB, "GB": 1e9}
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One published figure and the planner's."""

    group: str
    what: str
    predicted: float | None = None
    published: float | None = None
    fit: Fit | None = None
    runs: bool | None = None
    next_fit: Fit | None = None
    """One batch more, where the source says that there was no room for it."""
    seconds: float | None = None
    seconds_published: float | None = None

    @property
    def error(self) -> float | None:
        """Relative error of the memory."""
        return None if self.predicted is None or not self.published else self.predicted / self.published - 1

    @property
    def time_error(self) -> float | None:
        """Relative error of the time."""
        if self.seconds is None or not self.seconds_published:
            return None
        return self.seconds / self.seconds_published - 1

    @property
    def verdict_right(self) -> bool:
        """Whether the verdict is what happened: what ran is not said not to fit, and the other way round."""
        right = self.runs is None or (self.fit is not Fit.does_not_fit) == self.runs
        return right and self.next_fit is not Fit.fits


def read_groups() -> dict[str, Any]:
    """The published tables."""
    document: dict[str, Any] = yaml.safe_load(ROWS_FILE.read_text(encoding="utf-8"))
    return document


def predict_rows(document: dict[str, Any]) -> Iterator[Row]:
    """Every published row with what the planner says of it."""
    for group in document["groups"]:
        for values in group["rows"]:
            yield predict_row(document, group, {**group["defaults"], **values})


def predict_row(document: dict[str, Any], group: dict[str, Any], row: dict[str, Any]) -> Row:
    """One published row with what the planner says of it."""
    work = describe_row(document, row)
    capacity = document["gpus"][row["gpu"]][0] * GIB
    worker = estimate(work)
    figure = row.get("figure", group.get("figure"))
    published = row.get("published")
    following = None
    if row.get("most"):
        following = judge_fit(estimate(describe_row(document, {**row, "batch": row["batch"] + 1})), capacity)
    return Row(
        group=group["name"],
        what=tell_row(row, figure if "figure" in row else None),
        predicted=read_figure(worker, figure, capacity) / UNITS[group["unit"]] if figure else None,
        published=published,
        fit=judge_fit(worker, capacity),
        runs=row.get("runs"),
        next_fit=following,
        seconds=predict_seconds(document, row, work) if "seconds" in row else None,
        seconds_published=row.get("seconds"),
    )


def describe_row(document: dict[str, Any], row: dict[str, Any]) -> Workload:
    """The workload of a published row."""
    model = ModelConfig(
        name=row["model"],
        path="",
        max_position_embeddings=row["length"],
        quantization=Quantization(row.get("quantization", "nf4")),
        double_quantization=row.get("double_quantization", True),
        **dict(zip(SHAPE, document["models"][row["model"]], strict=True)),
    )
    options = document["programs"][row["program"]] if row["program"] != "cqlora" else {"lean_mlp": True}
    return Workload(
        model=model,
        lora=LoraConfig(rank=row["rank"], target_modules=row.get("targets", ["all"])),
        program=Program(**options),
        tokens=row["batch"] * row["length"],
        pack_tokens=row["length"],
        strategy=Strategy(row["strategy"]),
        workers=row["gpus"],
        cpu_offload=row.get("cpu_offload", False),
        offload_activations=row.get("offload_activations", False),
        checkpointing=Checkpointing(row.get("checkpointing", "full")),
        training=row.get("training", True),
    )


def read_figure(worker: Estimate, figure: str, capacity: float) -> float:
    """The kind of figure that a source gives: allocated, reserved, or all that the driver shows."""
    if figure == "allocated":
        return max(worker.allocated, worker.loading_allocated)
    peak = squeeze(max(worker.step, worker.loading), worker, capacity)
    return peak - worker.context if figure == "reserved" else peak


def predict_seconds(document: dict[str, Any], row: dict[str, Any], work: Workload) -> float | None:
    """The time that a row's source gives: SAMPLES_TIMED packs on all GPUs."""
    _, tflops, memory, link = document["gpus"][row["gpu"]]
    hardware = HardwareConfig(name=row["gpu"], peak_tflops=tflops, memory_gb_per_s=memory, link_gb_per_s=link)
    speed = find_speed(hardware)
    if speed is None:
        return None
    micro_steps = SAMPLES_TIMED / (row["batch"] * row["gpus"])
    return micro_steps * sum(micro_step_seconds(work, speed).values())


def tell_row(row: dict[str, Any], figure: str | None) -> str:
    """A row's configuration in a few words."""
    words = [row["model"], row.get("quantization", "nf4")]
    if row.get("quantization", "nf4") == "nf4" and not row.get("double_quantization", True):
        words.append("single")
    words += [f"b{row['batch']}", f"s{row['length']}", f"{row['gpus']}×{row['gpu']}", row["strategy"]]
    words += ["offload"] * row.get("cpu_offload", False) + ["+activations"] * row.get("offload_activations", False)
    words += [word for word in (row.get("note"), figure) if word]
    return " ".join(words)


def print_group(group: dict[str, Any], rows: list[Row], console: Console) -> None:
    """One table: predicted, published, error, verdict, time."""
    unit = group.get("unit", "")
    table = Table(title=f"{group['name']}: {group['title']}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    memory, time = (f"predicted {unit}", "published", "error"), ("s", "published s", "error")
    for heading in (*memory, "verdict", "ran", "one more", *time):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.what,
            tell(row.predicted, ".2f"),
            tell(row.published, ".2f"),
            tell(row.error, "+.1%"),
            row.fit.value if row.fit else "",
            {True: "yes", False: "no", None: ""}[row.runs],
            row.next_fit.value if row.next_fit else "",
            tell(row.seconds, ".0f"),
            tell(row.seconds_published, ".0f"),
            tell(row.time_error, "+.0%"),
        )
    console.print(table)
    errors = [abs(row.error) for row in rows if row.error is not None]
    if errors:
        console.print(f"mean error {mean(errors):.1%}, largest {max(errors):.1%}, over {len(errors)} rows")
    judged = [row for row in rows if row.runs is not None or row.next_fit is not None]
    if judged:
        console.print(f"verdicts right: {sum(row.verdict_right for row in judged)} of {len(judged)}")
    times = [abs(row.time_error) for row in rows if row.time_error is not None]
    if times:
        console.print(f"mean error of the time {mean(times):.0%}, largest {max(times):.0%}, over {len(times)} rows")
    console.print()


def tell(value: float | None, form: str) -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


CPU_CASES = {
    "tiny": "model=tiny",
    "tiny, batch 16": "model=tiny hardware.micro_batch_size=16 stage.global_batch_size=16",
    "tiny, batch 16, checkpointed": (
        "model=tiny hardware.micro_batch_size=16 stage.global_batch_size=16 hardware.activation_checkpointing=full"
    ),
    "tiny, 16,384 tokens of vocabulary": "model=tiny model.vocab_size=16384 model.path=models/tiny_wide",
    "SmolLM2, batch 1 of 256": "model=smollm2_135m stage.sequence_length=256 hardware.micro_batch_size=1",
    "SmolLM2, batch 1 of 512": "model=smollm2_135m hardware.micro_batch_size=1",
    "SmolLM2, batch 2 of 512": "model=smollm2_135m hardware.micro_batch_size=2",
    "SmolLM2, batch 2 of 512, checkpointed": (
        "model=smollm2_135m hardware.micro_batch_size=2 hardware.activation_checkpointing=full"
    ),
    "SmolLM2, batch 1 of 1,024": "model=smollm2_135m stage.sequence_length=1024 hardware.micro_batch_size=1",
    "SmolLM2, batch 4 of 512": "model=smollm2_135m hardware.micro_batch_size=4 stage.global_batch_size=4",
    "SmolLM2, batch 4 of 512, checkpointed": (
        "model=smollm2_135m hardware.micro_batch_size=4 stage.global_batch_size=4 "
        "hardware.activation_checkpointing=full"
    ),
    "SmolLM2, rank 128": "model=smollm2_135m hardware.micro_batch_size=1 lora.rank=128",
    "SmolLM2, 16 bit": "model=smollm2_135m hardware.micro_batch_size=1 model.quantization=none",
}
CPU_COMMON = (
    "stage=pretrain data=sample hardware=cpu hardware.precision=float32 tracking=none "
    "stage.max_steps=2 stage.eval_tokens=256 stage.resume=never"
)


def measure_cpu_runs(folder: Path, console: Console) -> list[Row]:
    """Train each case for two steps in a process of its own and set its peak memory beside the planner's."""
    rows = []
    for number, (name, overrides) in enumerate(CPU_CASES.items()):
        arguments = [*CPU_COMMON.split(), *overrides.split()]
        run = folder / f"{number:02d}"
        command = [sys.executable, "-m", "cqlora.run", *arguments, f"hydra.run.dir={run}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        measured = max(line["peak_memory_gib"] for line in lines if line["kind"] == "train")
        rows.append(Row(group="CPU", what=name, predicted=plan_cpu_run(arguments), published=measured))
        console.print(f"{name}: predicted {rows[-1].predicted:.3f}, measured {measured:.3f}, {rows[-1].error:+.1%}")
    return rows


def plan_cpu_run(arguments: list[str]) -> float:
    """GiB that the planner says a run on this processor takes."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from cqlora.config.schema import CONFIG_DIR, register_schemas
    from cqlora.launch.settle import look_ahead, settle
    from cqlora.plan.memory import plan_memory

    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        config: Any = OmegaConf.to_object(compose("config", arguments))
    return plan_memory(settle(config, look_ahead(config))).peak / GIB


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", type=Path, metavar="DIR", help="run here, in folders under DIR")
    arguments = parser.parse_args()
    console = Console(width=160, highlight=False)
    if arguments.cpu:
        group = {"name": "CPU", "title": "this machine, GiB resident", "unit": "GiB"}
        print_group(group, measure_cpu_runs(arguments.cpu, console), console)
        return
    document = read_groups()
    rows = list(predict_rows(document))
    for group in document["groups"]:
        print_group(group, [row for row in rows if row.group == group["name"]], console)


if __name__ == "__main__":
    main()
