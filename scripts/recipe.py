"""`make recipe`: pretraining, then instruction tuning on top of it, each evaluated; a merged model with its card.

    python scripts/recipe.py [--minutes 20] [--folder outputs/recipe] [--base FOLDER] [--write]

Text is that of `CQLORA_DATA` where it is set (Wikipedia for pretraining; oasst1, ShareGPT and BELLE for tuning, as the
published models had them), else the bundled sample. Half of the minutes go to each stage's steps, whose time is taken
first; evaluations come on top. `--write` puts the table between the markers of both READMEs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from cqlora.base import README, read_card
from cqlora.config.run_yaml import load_run_yaml
from cqlora.model_card import merged_page
from cqlora.system.metrics import read_metrics
from cqlora.system.pages import write_between_markers

ROOT = Path(__file__).parent.parent
COMMON = ("hardware=cpu", "tracking=none", "stage.sequence_length=512", "stage.global_batch_size=4", "lora.rank=64",
          "lora.alpha=64", "data.val_fraction=0.1", "stage.eval_tokens=2048")  # fmt: skip
STAGES = {
    "pretrain": ("stage=pretrain", "stage.learning_rate=1e-3"),
    "sft": ("stage=sft", "stage.learning_rate=5e-4"),
}
PUBLISHED = {"pretrain": "wiki_zh_en", "sft": "oasst1_sharegpt_belle"}
CALIBRATION_STEPS = 3


def main() -> None:
    """Both stages, the evaluation, the merged model and its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--folder", type=Path, default=Path("outputs/recipe"))
    parser.add_argument("--base", type=Path, default=Path("models/smollm2_135m"))
    parser.add_argument("--model", default="smollm2_135m", help="the base's group")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.folder.exists():
        sys.exit(f"{options.folder} is there already; move it away, or give another --folder.")
    if not options.base.exists():
        call("fetch", f"output_dir={options.base}")
    pretrained = train(options, "pretrain")
    tuned = train(options, "sft", f"stage.init_adapter={pretrained}")
    models = [str(options.base), f"{options.base}+{pretrained}", f"{options.base}+{tuned}"]
    record = evaluate(options, models)
    merged = options.folder / "model"
    call("merge", f"base={options.base}", f"adapter={tuned}", f"output_dir={merged}")
    table = show_table(record)
    runs = [load_run_yaml(options.folder / stage / "run.yaml") for stage in STAGES]
    (merged / README).write_text(merged_page(read_card(merged)["base"], runs, table), encoding="utf-8")
    print(table)
    if options.write:
        write_between_markers(ROOT / "README.md", "recipe", table)
        write_between_markers(ROOT / "README.zh-CN.md", "recipe", translate(table))
    print(f"model   {merged}\nrecord  {options.folder / 'evaluation.json'}\ntalk    cqlora chat base={merged}")


def call(verb: str, *overrides: str) -> None:
    """Run a verb as a user would, its output on the terminal."""
    print(f"$ cqlora {verb} {' '.join(overrides)}", flush=True)
    done = subprocess.run([sys.executable, "-m", f"cqlora.{verb}", *overrides], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def train(options: argparse.Namespace, stage: str, *overrides: str) -> Path:
    """A stage of as many steps as half of the minutes hold, by the time of its first ones; its adapter."""
    common = (f"model={options.model}", f"model.path={options.base}", f"data={choose_data(stage)}", *COMMON,
              *STAGES[stage], f"data.cache_dir={options.folder / 'cache'}", *overrides)  # fmt: skip
    trial, run = options.folder / f"{stage}_trial", options.folder / stage
    call("run", *common, f"hydra.run.dir={trial}", f"stage.max_steps={CALIBRATION_STEPS}", "stage.warmup_steps=0")
    seconds = [line["seconds"] for line in read_metrics(trial) if line["kind"] == "train"]
    steps = max(1, int(options.minutes * 30 * len(seconds) / sum(seconds)))
    call("run", *common, f"hydra.run.dir={run}", f"stage.max_steps={steps}", f"stage.warmup_steps={min(5, steps - 1)}")
    shutil.rmtree(trial)
    return run / "adapter"


def choose_data(stage: str) -> str:
    """The published mix where its text is at hand, else what is bundled."""
    return PUBLISHED[stage] if os.environ.get("CQLORA_DATA") else "sample"


def evaluate(options: argparse.Namespace, models: list[str]) -> dict[str, Any]:
    """Held-out text of the pretraining run, the probe and generations of the base and after each stage."""
    file = options.folder / "evaluation.json"
    data = load_run_yaml(options.folder / "pretrain" / "run.yaml").data
    call("evaluate", f"models=[{','.join(models)}]", f"data={choose_data('pretrain')}", f"output={file}",
         f"data.val_fraction={data.val_fraction}")  # fmt: skip
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def show_table(record: dict[str, Any]) -> str:
    """A Markdown table, a column for the base and for each stage."""
    names = ("base", "pretrained", "then tuned")
    rows = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    models = record["models"]
    for number, row in enumerate(models[0].get("text", [])):
        language, unit = ("Chinese", "bits_per_character") if row["language"] == "zh" else ("English", "bits_per_byte")
        cells = [
            f"{model['text'][number][unit]:.3f} ± {model['text'][number][unit + '_error']:.3f}" for model in models
        ]
        rows.append(f"| {language}, {unit.replace('_', ' ')} ({row['source']}) | {' | '.join(cells)} |")
    for number, row in enumerate(models[0].get("probe", [])):
        cells = [f"{model['probe'][number]['gain']:.2f}" for model in models]
        rows.append(f"| probe, {row['pattern']} ({row['language']}): gain in context | {' | '.join(cells)} |")
    for language, told in (("zh", "Chinese"), ("en", "English")):
        cells = [share_in_language(model, language) for model in models]
        rows += [f"| replies in {told} where asked in it | {' | '.join(cells)} |"] if all(cells) else []
    return "\n".join(rows)


_CHINESE = {
    "| base | pretrained | then tuned |": "| 底座 | 预训练后 | 再微调后 |",
    "Chinese, bits per character": "中文，每字符比特数", "English, bits per byte": "英文，每字节比特数",
    "probe, translation": "探针，翻译", "probe, classification": "探针，分类", "probe, copying": "探针，复制",
    ": gain in context": "：示例带来的改善",
    "replies in Chinese where asked in it": "用中文提问时中文回答的比例",
    "replies in English where asked in it": "用英文提问时英文回答的比例",
}  # fmt: skip


def translate(table: str) -> str:
    """The table in Chinese."""
    for english, chinese in _CHINESE.items():
        table = table.replace(english, chinese)
    return table


def share_in_language(model: dict[str, Any], language: str) -> str:
    """Mean share of the characters of replies that are in the prompt's language; empty where none was asked for."""
    shares = [each["language_share"] for each in model.get("generations", []) if each["language"] == language]
    return f"{sum(shares) / len(shares):.0%}" if shares else ""


if __name__ == "__main__":
    main()
