"""Recipes for teaching a base Chinese, at equal time or equal characters: benchmarks/recipes.yaml names them.

    python benchmarks/recipes.py models/smollm2_135m wiki_zh.jsonl wiki_en.jsonl --budget 15min --seeds 1 2 3
        [--recipes no_vocabulary recipe_2023 …] [--clock processor|wall] [--folder outputs/recipes]
        [--trl-python TRL_VENV/bin/python] [--write docs] [--smoke]

A budget is a time (60s, 15min) or a number of characters (300000ch). Time is that of the steps alone: a few steps of
every recipe are measured in turn before any is trained, all but the first, which prepares what the others use; the
least of some rounds is what a step takes (paces.jsonl), and the recipe gets as many as the budget holds, whatever
else the machine does later; loading, extending and evaluating are not counted. A tenth of each file is held out, by a
hash of the document, and held_out.txt lists the hashes. Every result is a line of results.jsonl and is not computed
again; the table and the plot are of all lines. TRL's environment is that of benchmarks/train_step.py.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cqlora.system.pages import write_between_markers

ROOT = Path(__file__).parent.parent
HELD_OUT = 0.1
PACES = "paces.jsonl"
LANGUAGES = ("zh", "en")
COMMON = (
    "stage=pretrain", "data=wiki_zh_en", "data.sources.wiki_zh.sample=null", "data.sources.wiki_en.sample=null",
    "data.val_fraction=0", "hardware=cpu", "tracking=none", "stage.sequence_length=512",
    "stage.checkpoint_every_steps=100000",
)  # fmt: skip
PACE_STEPS, PACE_ROUNDS = 5, 2
"""Of every recipe, in turn; the first step of a round is not counted."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a recipe may spend: seconds of a clock, or characters of text."""

    amount: float
    unit: str
    """s or ch."""

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """`60s`, `15min`, `2h` or `300000ch`."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h|ch)", text)
        if not match or float(match[1]) <= 0:
            raise argparse.ArgumentTypeError(f"{text} is no budget; use 60s, 15min, 2h or 300000ch.")
        seconds = {"s": 1, "min": 60, "h": 3600, "ch": 1}[match[2]]
        return cls(float(match[1]) * seconds, "ch" if match[2] == "ch" else "s")

    def __str__(self) -> str:
        return f"{self.amount:g}{self.unit}"


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training cost and what came of it."""

    adapter: Path
    step_seconds: list[float]
    """Of each step, by the wall clock."""
    busy: float
    """Processor seconds of a wall second."""
    characters: float

    @property
    def steps(self) -> int:
        """How many."""
        return len(self.step_seconds)

    def seconds(self, first: int = 0) -> dict[str, float]:
        """Of the steps from this one on, by clock: wall and processor."""
        wall = sum(self.step_seconds[first:])
        return {"wall": wall, "processor": wall * self.busy}


def main() -> None:
    """Run what is missing, then show all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("files", type=Path, nargs=2, help="Chinese and English documents, rows with a text")
    parser.add_argument("--budget", type=Budget.parse, default=Budget(900.0, "s"))
    parser.add_argument("--clock", choices=["processor", "wall"], default="processor")
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1], help="none: only what a step takes")
    parser.add_argument("--folder", type=Path, default=Path("outputs/recipes"))
    parser.add_argument("--characters", type=int, default=20_000, help="held-out characters of each language to score")
    parser.add_argument("--sequences", type=int, default=4, help="in a step, of 512 tokens")
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--write", type=Path, help="folder with recipes.md and recipes.zh-CN.md to put the table into")
    parser.add_argument("--smoke", action="store_true", help="small sequences and one round, for a budget of seconds")
    options = parser.parse_args()
    recipes, results = read_recipes(options.recipes), options.folder / "results.jsonl"
    split_text(options)
    for turn in range(1 if options.smoke else PACE_ROUNDS):
        for name, recipe in recipes.items():
            measure_pace(options, name, recipe, turn)
    for seed in options.seeds:
        for name in ["base", *recipes]:
            key = {"recipe": name, "seed": seed if name in recipes else 0, "budget": str(options.budget),
                   "clock": options.clock}  # fmt: skip
            key |= {} if name in recipes else {"budget": "", "clock": ""}
            if not find_line(results, key):
                add_line(results, key | compare(options, name, recipes.get(name), seed))
    if not options.seeds:
        return
    table = show_table(read_lines(results))
    print(table)
    plot(read_lines(results), options.folder / "recipes.svg")
    if options.write:
        write_between_markers(options.write / "recipes.md", "recipes", table)
        write_between_markers(options.write / "recipes.zh-CN.md", "recipes", translate(table))


_CHINESE = {
    "recipe": "方案", "budget": "预算", "seeds": "种子数", "steps": "步数", "characters": "字符数",
    "Chinese bits per character": "中文每字符比特数", "gain": "改善", "English bits per byte": "英文每字节比特数",
    "of the base's": "相对底座", "probe, of the base's": "探针，相对底座",
}  # fmt: skip
"""What the table's head says, in Chinese."""


def read_recipes(names: list[str] | None) -> dict[str, dict[str, Any]]:
    """The recipes of benchmarks/recipes.yaml by name; TRL only where it is asked for, since it is another program."""
    known = yaml.safe_load((ROOT / "benchmarks" / "recipes.yaml").read_text(encoding="utf-8"))
    for name in names or ():
        if name not in known:
            sys.exit(f"--recipes {name} is not in benchmarks/recipes.yaml; use some of {', '.join(known)}.")
    return {name: known[name] for name in names or [name for name in known if "trainer" not in known[name]]}


def split_text(options: argparse.Namespace) -> None:
    """Put each file's documents to learn from and those held out into files of their own, and list the latter."""
    folder, hashes = options.folder / "text", []
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for language, file in zip(LANGUAGES, options.files, strict=True):
        parts: dict[bool, list[str]] = {True: [], False: []}
        for line in file.read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"]
            digest = hashlib.sha256(text.encode()).hexdigest()
            held_out = int(digest[:8], 16) < HELD_OUT * 2**32
            parts[held_out].append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            hashes += [f"{file.name} {digest}\n"] if held_out else []
        (folder / "train" / f"wiki_{language}.jsonl").write_text("".join(parts[False]), encoding="utf-8")
        (folder / f"held_out_{language}.jsonl").write_text("".join(parts[True]), encoding="utf-8")
    (folder / "held_out.txt").write_text("".join(sorted(hashes)), encoding="utf-8")


def compare(options: argparse.Namespace, name: str, recipe: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    """What one recipe gives for the budget; no recipe: the untouched base."""
    print(f"{name}, seed {seed}, {options.budget}", flush=True)
    if recipe is None:
        return evaluate(options, str(options.base), "base")
    base = extend(options, name, recipe)
    folder = options.folder / "runs" / f"{name}-{seed}-{options.budget}-{options.clock}"
    # What an interrupted comparison left is of other steps, perhaps.
    shutil.rmtree(folder, ignore_errors=True)
    steps = max(1, round(options.budget.amount / read_pace(options, name)))
    done = train(options, recipe, base, seed, steps, folder)
    found = evaluate(options, f"{base}+{done.adapter}", folder.name)
    seconds = {f"{clock}_seconds": round(value, 1) for clock, value in done.seconds().items()}
    return {"steps": done.steps, "characters": round(done.characters), **seconds, **found}


def measure_pace(options: argparse.Namespace, name: str, recipe: dict[str, Any], turn: int) -> None:
    """Put what a step takes in this turn behind the others, where it is not there yet."""
    key = {"recipe": name, "turn": turn, "sequences": options.sequences}
    if find_line(options.folder / PACES, key):
        return
    print(f"{name}, pace, turn {turn + 1} of {PACE_ROUNDS}", flush=True)
    folder = options.folder / "paces" / name
    shutil.rmtree(folder, ignore_errors=True)
    done = train(options, recipe, extend(options, name, recipe), 1, PACE_STEPS, folder)
    pace = {clock: seconds / (done.steps - 1) for clock, seconds in done.seconds(first=1).items()}
    add_line(options.folder / PACES, key | {"ch": done.characters / done.steps} | pace)


def read_pace(options: argparse.Namespace, name: str) -> float:
    """The least that a step of a recipe takes, in the budget's unit."""
    unit = "ch" if options.budget.unit == "ch" else options.clock
    lines = read_lines(options.folder / PACES)
    key = {"recipe": name, "sequences": options.sequences}
    return min(line[unit] for line in lines if all(line[field] == key[field] for field in key))


def train(
    options: argparse.Namespace, recipe: dict[str, Any], base: Path, seed: int, steps: int, folder: Path
) -> Trained:
    """A run of so many steps, by the recipe's program."""
    program = train_with_trl if recipe.get("trainer") == "trl" else train_with_cqlora
    return program(options, recipe, base, seed, steps, folder)


def extend(options: argparse.Namespace, name: str, recipe: dict[str, Any]) -> Path:
    """The recipe's base, extended once for all seeds on the text to learn from."""
    if not recipe["extend"]:
        return Path(options.base)
    folder = options.folder / "bases" / name
    if not folder.is_dir():
        corpus = f"vocab.corpus=[{options.folder / 'text' / 'train' / 'wiki_zh.jsonl'}]"
        corpus = "" if "vocab=cjk" in recipe["extend"] else corpus
        call("extend", f"base={options.base}", f"output_dir={folder}", *recipe["extend"], *filter(None, [corpus]))
    return folder


def train_with_cqlora(
    options: argparse.Namespace, recipe: dict[str, Any], base: Path, seed: int, steps: int, folder: Path
) -> Trained:
    """A run of so many steps."""
    small = ["model=tiny", "stage.sequence_length=64"] if options.smoke else ["model=smollm2_135m"]
    spent = call(
        "run", *COMMON, f"stage.global_batch_size={options.sequences}", *recipe["run"], *small, f"model.path={base}",
        f"data.root={options.folder / 'text' / 'train'}",
        f"data.cache_dir={options.folder / 'cache'}", f"stage.max_steps={steps}", f"seed={seed}",
        f"hydra.run.dir={folder}",
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    step_seconds = [line["seconds"] for line in trained]
    characters = trained[-1]["tokens"] * characters_per_token(folder)
    return Trained(folder / "adapter", step_seconds, spent["processor"] / spent["wall"], characters)


def characters_per_token(run: Path) -> float:
    """Of the text that a run trains on."""
    from cqlora.base import read_base
    from cqlora.config.run_yaml import load_run_yaml
    from cqlora.data.cache import prepare_cache

    config = load_run_yaml(run / "run.yaml")
    sources = prepare_cache(config, read_base(config.model.path)).summary["sources"].values()
    return sum(each["characters"] for each in sources) / sum(each["tokens"] for each in sources)


def train_with_trl(
    options: argparse.Namespace, recipe: dict[str, Any], base: Path, seed: int, steps: int, folder: Path
) -> Trained:
    """TRL in a process of its own, on the same documents in the same order of magnitude of a step."""
    length = "64" if options.smoke else "512"
    texts = options.folder / "text" / "train"
    settings = {"per_device_train_batch_size": options.sequences, **recipe["settings"]}
    worker = [ROOT / "benchmarks" / "recipes_trl.py", base, texts, folder, steps, seed, length, json.dumps(settings)]
    spent = start([options.trl_python, *map(str, worker)])
    told = json.loads((folder / "told.json").read_text(encoding="utf-8"))
    return Trained(folder / "adapter", told["step_seconds"], spent["processor"] / spent["wall"], told["characters"])


def evaluate(options: argparse.Namespace, model: str, name: str) -> dict[str, Any]:
    """Held-out text of both languages, and the in-context probe."""
    file = options.folder / "evaluations" / f"{name}.json"
    texts = ",".join(str(options.folder / "text" / f"held_out_{language}.jsonl") for language in LANGUAGES)
    call(
        "evaluate", f"models=[{model}]", f"files=[{texts}]", "parts=[text,probe]", f"output={file}",
        f"characters={options.characters}", *(["window=128", "stride=64"] if options.smoke else []),
    )  # fmt: skip
    return read_scores(json.loads(file.read_text(encoding="utf-8"))["models"][0])


def read_scores(measured: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a model in evaluation.json."""
    scores: dict[str, Any] = {}
    for row in measured["text"]:
        for key in ("bits_per_character", "bits_per_byte"):
            scores[f"{row['language']}_{key}"] = row[key]
            scores[f"{row['language']}_{key}_error"] = row[f"{key}_error"]
    gains = [row["gain"] for row in measured["probe"]]
    return scores | {"probe": sum(gains) / len(gains)}


def call(verb: str, *overrides: str) -> dict[str, float]:
    """Run a verb; its output is shown only where it fails. See start."""
    return start([sys.executable, "-m", f"cqlora.{verb}", *overrides])


def start(command: list[str]) -> dict[str, float]:
    """Run a program to its end; the wall and processor seconds that it took, its own children's included."""
    began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {"wall": time.monotonic() - began, "processor": processor}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Every line so far; a last one that was cut off counts for nothing."""
    if not file.is_file():
        return []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def find_line(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The line of a recipe, seed, budget and clock, say, where it is there."""
    return next((line for line in read_lines(file) if all(line[name] == key[name] for name in key)), None)


def add_line(file: Path, line: dict[str, Any]) -> None:
    """Put a line behind the others, and away what an interrupted write left."""
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in [*read_lines(file), line])
    staged = file.with_name(f"{file.name}.staging")
    staged.write_text(lines, encoding="utf-8")
    staged.replace(file)


def show_table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table, a row for each recipe and budget, means over seeds; the best Chinese of each budget first."""
    base = next(line for line in lines if line["recipe"] == "base")
    head = ["recipe", "budget", "seeds", "steps", "characters", "Chinese bits per character", "gain",
            "English bits per byte", "of the base's", "probe, of the base's"]  # fmt: skip
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    error = base["zh_bits_per_character_error"]
    rows.append(
        f"| untouched base | | | | | {base['zh_bits_per_character']:.3f} ± {error:.3f} | | "
        f"{base['en_bits_per_byte']:.3f} | | |"
    )
    for (recipe, budget, clock), group in group_lines(lines).items():
        zh, en, probe, steps, characters = (
            mean([line[key] for line in group])
            for key in ("zh_bits_per_character", "en_bits_per_byte", "probe", "steps", "characters")
        )
        spread = max(abs(line["zh_bits_per_character"] - zh) for line in group)
        shown = f"{zh:.3f}" + (f" ± {spread:.3f}" if len(group) > 1 else "")
        clocked = budget if budget.endswith("ch") else f"{budget} {clock}"
        rows.append(
            f"| `{recipe}` | {clocked} | {len(group)} | {steps:.0f} | {characters:,.0f} | {shown} | "
            f"{base['zh_bits_per_character'] - zh:+.3f} | {en:.3f} | {en / base['en_bits_per_byte'] - 1:+.1%} | "
            f"{probe / base['probe'] - 1:+.1%} |"
        )
    return "\n".join(rows)


def translate(table: str) -> str:
    """The table in Chinese."""
    head, rule, *rows = table.splitlines()
    for english, chinese in _CHINESE.items():
        head = head.replace(f"| {english} |", f"| {chinese} |")
    body = "\n".join([rule, *rows]).replace("| untouched base |", "| 未训练的底座 |")
    return f"{head}\n{body}".replace("s processor |", " 秒（处理器） |").replace("s wall |", " 秒（时钟） |")


def group_lines(lines: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Results by recipe, budget and clock, of the untouched base none; by budget, then the best first."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        if line["recipe"] != "base":
            groups.setdefault((line["recipe"], line["budget"], line["clock"]), []).append(line)

    def order(item: tuple[tuple[str, str, str], list[dict[str, Any]]]) -> tuple[Any, ...]:
        (_, budget, clock), group = item
        parsed = Budget.parse(budget)
        return parsed.unit, clock, parsed.amount, mean([line["zh_bits_per_character"] for line in group])

    return dict(sorted(groups.items(), key=order))


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def plot(lines: list[dict[str, Any]], file: Path) -> None:
    """Each recipe's Chinese against its English, the untouched base at the lines; needs `cqlora[plots]`."""
    from matplotlib import pyplot

    base = next(line for line in lines if line["recipe"] == "base")
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for (recipe, budget, _), group in group_lines(lines).items():
        axes.scatter(
            [line["en_bits_per_byte"] for line in group],
            [line["zh_bits_per_character"] for line in group],
            label=f"{recipe}, {budget}",
        )
    axes.axvline(base["en_bits_per_byte"], color="0.7", linewidth=0.8)
    axes.axhline(base["zh_bits_per_character"], color="0.7", linewidth=0.8)
    axes.set(xlabel="English bits per byte", ylabel="Chinese bits per character", title="Less is better; lines: base")
    axes.legend(fontsize="small")
    figure.savefig(file)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
