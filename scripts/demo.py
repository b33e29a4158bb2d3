"""`make demo`: a real pretrained model gets Chinese words and learns from the bundled sample, on this processor.

It measures this machine first, and trains for as many steps as leave it below LIMIT_MINUTES from its first line.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from cqlora.base import read_base
from cqlora.config.run_yaml import load_run_yaml
from cqlora.data.cache import prepare_cache
from cqlora.data.sources import SAMPLE_DIR
from cqlora.system.metrics import read_metrics
from cqlora.system.progress import duration, open_console

BASE = Path("models/smollm2_135m")
EXTENDED = Path("models/smollm2_135m_demo")
RUNS = Path("outputs/demo")
PIECES = 1000
"""As many as 40,000 characters of text can teach well; a corpus of your own supports tens of thousands."""

LIMIT_MINUTES = 8.0
RESERVE = 0.1
"""Share of the limit that is planned for nothing, since a machine is not as quick every minute."""
EVALUATION_SECONDS = 30
"""About as long as one of the four evaluations may take."""
FORWARD_FLOPS, STEP_FLOPS = 2 * 135e6, 6 * 135e6
"""Of a token of the model; half of what bare matrix products reach is reached in it."""
FEWEST_CHARACTERS, MOST_CHARACTERS = 300, 6000
"""Chinese text to be scored on, twice as much English: the sample holds out 6,000 and 17,000."""
STEP_SECONDS = 10
STEP_TOKENS = (1024, 512, 256, 128)
"""Of which a step has the most that take STEP_SECONDS."""
MEASURED_STEPS = 2
FEWEST_STEPS, MOST_STEPS = 4, 120
"""Below which nothing is learned, and above which the sample's 65,000 tokens are only learned by heart."""

PROMPTS = ("长江是中国", "The Yangtze is")
REPLY_TOKENS = 40


@dataclass(frozen=True, slots=True)
class Scale:
    """How much a run does at once on this machine."""

    characters: int
    """Held-out Chinese, twice as much English."""
    tokens: int
    """Of a step."""

    @property
    def overrides(self) -> list[str]:
        """Packs of 512 tokens, or one that is shorter."""
        packs, length = max(1, self.tokens // 512), min(512, self.tokens)
        return [
            f"stage.global_batch_size={packs}",
            f"hardware.micro_batch_size={packs}",
            f"stage.sequence_length={length}",
        ]


@dataclass(frozen=True, slots=True)
class Pace:
    """What a run takes here, in seconds."""

    step: float
    around: float
    """Imports, loading, both evaluations and saving: all but its steps."""


def main() -> None:
    """Fetch, extend, measure the base and the machine, train, and print what it bought."""
    started = time.monotonic()
    call("fetch", f"output_dir={BASE}")
    extend_base()
    folder = RUNS / time.strftime("%Y-%m-%d_%H-%M-%S")
    flops = probe_flops()
    scale = choose_scale(flops)
    tell(f"{flops / 1e9:.0f} GFLOP/s in matrix products; measuring the untouched base, and {MEASURED_STEPS} steps")
    options = (*hold_out(folder / "text", scale.characters), *scale.overrides)
    before, pace = measure(folder / "base", options)
    began = time.monotonic()
    replies = {"base": write_on(str(BASE), "")}
    writing = time.monotonic() - began
    left = LIMIT_MINUTES * 60 * (1 - RESERVE) - (time.monotonic() - started) - pace.around - writing
    steps = choose_steps(left, pace.step)
    tell(f"{pace.step:.1f} s a step, {duration(pace.around)} around them: {steps} steps in what is left")
    after = train(
        EXTENDED,
        folder / "trained",
        *options,
        f"stage.max_steps={steps}",
        f"stage.warmup_steps={min(5, steps // 4)}",
        "stage.learning_rate=5e-4",
        "stage.embeddings_learning_rate=2e-3",
    )
    replies["trained"] = write_on(str(EXTENDED), str(after / "adapter"))
    show(before, after, (time.monotonic() - started) / 60)
    show_replies(replies)
    show_next(after)


def extend_base() -> None:
    """Give the base Chinese pieces that are learned from the sample, once."""
    if (EXTENDED / "config.json").is_file():
        return
    corpus = SAMPLE_DIR / "sample_zh" / "train.jsonl"
    call("extend", "vocab=auto", f"base={BASE}", f"output_dir={EXTENDED}", f"vocab.size={PIECES}",
         f"vocab.corpus=[{corpus}]")  # fmt: skip


def probe_flops(seconds: float = 2.0) -> float:
    """Mean FLOP/s of float32 matrix products, whatever else this machine is doing."""
    import torch

    size, products = 512, 0
    matrix = torch.randn(size, size)
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        torch.mm(matrix, matrix)
        products += 1
    return products * 2 * size**3 / (time.monotonic() - began)


def choose_scale(flops: float) -> Scale:
    """What keeps evaluations and steps short; with its English, a Chinese character is two and a half tokens."""
    tokens = EVALUATION_SECONDS * 0.5 * flops / FORWARD_FLOPS
    characters = max(FEWEST_CHARACTERS, min(MOST_CHARACTERS, int(tokens / 2.5)))
    affordable = STEP_SECONDS * 0.5 * flops / STEP_FLOPS
    return Scale(characters, next((each for each in STEP_TOKENS if each <= affordable), STEP_TOKENS[-1]))


def hold_out(folder: Path, characters: int) -> list[str]:
    """Write the sample with fewer held-out documents, the same for every vocabulary; the overrides that name it."""
    for name, limit in (("sample_zh", characters), ("sample_en", 2 * characters)):
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(SAMPLE_DIR / name / "train.jsonl", target)
        taken, room = [], limit
        for line in (SAMPLE_DIR / name / "val.jsonl").read_text(encoding="utf-8").splitlines():
            if room > 0:
                taken.append(line)
            room -= len(json.loads(line)["text"])
        (target / "val.jsonl").write_text("\n".join(taken) + "\n", encoding="utf-8")
    return [f"data.sources.{name}.path={folder / name}" for name in ("sample_zh", "sample_en")]


def measure(folder: Path, options: tuple[str, ...]) -> tuple[Path, Pace]:
    """A few steps of the untouched base: its held-out scores before them, and what a run takes on this machine."""
    began = time.monotonic()
    run = train(BASE, folder, *options, f"stage.max_steps={MEASURED_STEPS}", "stage.warmup_steps=0")
    taken = time.monotonic() - began
    seconds = [row["seconds"] for row in read_metrics(run) if row["kind"] == "train"]
    # The first step also warms up.
    return run, Pace(step=sum(seconds[1:]) / (len(seconds) - 1), around=taken - sum(seconds))


def choose_steps(seconds: float, step_seconds: float) -> int:
    """Optimizer steps that fit into what is left, few but not none where nothing is."""
    return max(FEWEST_STEPS, min(MOST_STEPS, int(seconds / step_seconds)))


def write_on(model: str, adapter: str) -> list[str]:
    """How a model goes on from each of PROMPTS, the likeliest token each time."""
    from cqlora.engine import LlamaEngine
    from cqlora.inference.requests import Sampling

    tell(f"writing with {adapter or model}")
    engine = LlamaEngine(adapter, model) if adapter else LlamaEngine(model, use_lora=False)
    sampling = Sampling(max_new_tokens=REPLY_TOKENS, temperature=0, repetition_penalty=1.3)
    texts = []
    for prompt in PROMPTS:
        batch = engine.open_batch(1)
        reply = batch.admit(engine.encode_text(prompt), sampling)
        text = ""
        while reply.finish_reason is None and not reply.failure:
            text += "".join(piece for _, piece in batch.step())
        texts.append(" ".join(text.split()))
    return texts


def tell(what: str) -> None:
    """A line of the demo's own."""
    print(f"demo: {what}", flush=True)


def call(verb: str, *arguments: str) -> None:
    """Run a verb as a user would, its output on the terminal."""
    print(f"$ cqlora {verb} {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", f"cqlora.{verb}", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def train(model: Path, folder: Path, *overrides: str) -> Path:
    """One pretraining run on the bundled sample; its folder."""
    common = ("stage=pretrain", "model=smollm2_135m", f"model.path={model}", "data=sample", "hardware=cpu")
    call("run", *common, "tracking=none", "stage.eval_tokens=0", f"hydra.run.dir={folder}", *overrides)
    return folder


def show(before: Path, after: Path, minutes: float) -> None:
    """The table: the untouched base against the extended and trained one."""
    console = open_console()
    table = Table(title="SmolLM2-135M, held-out text of the bundled sample")
    for name in ("", "base", "extended, untrained", "extended, trained"):
        table.add_column(name, justify="right" if name else "left")
    base, start, end = held_out(before, first=True), held_out(after, first=True), held_out(after, first=False)
    for language, language_name, unit in (("zh", "Chinese", "character"), ("en", "English", "byte")):
        cells = [f"{scores[language][f'bits_per_{unit}']:.3f}" for scores in (base, start, end)]
        table.add_row(f"{language_name} bits per {unit}", *cells)
    tokens = [f"{tokens_per_character(folder):.3f}" for folder in (before, after, after)]
    table.add_row("tokens per Chinese character", *tokens)
    steps = [row for row in read_metrics(after) if row["kind"] == "train"]
    seconds = sum(row["seconds"] for row in steps)
    table.add_row("tokens per second", "", "", f"{steps[-1]['tokens'] / seconds:,.0f}")
    table.add_row("peak memory, GiB", "", "", f"{max(row['peak_memory_gib'] for row in steps):.2f}")
    table.add_row("steps", "", "", str(len(steps)))
    table.add_row("minutes in all", "", "", f"{minutes:.1f}")
    console.print(table)


def show_replies(replies: dict[str, list[str]]) -> None:
    """How the base and the trained model go on from the same words."""
    console = open_console()
    for number, prompt in enumerate(PROMPTS):
        for name, texts in replies.items():
            console.print(f"{name:8} {prompt}… {texts[number]}", markup=False, soft_wrap=True)


def show_next(run: Path) -> None:
    """Where everything lies, and what to type next."""
    adapter = run / "adapter"
    open_console().print(
        f"\nbase     {EXTENDED}\nadapter  {adapter}\nmetrics  {run / 'metrics.jsonl'}\n\n"
        f"talk to it       {sys.executable} -m cqlora.chat base={EXTENDED} adapter={adapter}\n"
        f"on your own text docs/first_model.md, in Chinese docs/first_model.zh-CN.md",
        markup=False,
        soft_wrap=True,
    )


def held_out(folder: Path, first: bool) -> dict[str, dict[str, float]]:
    """Each language's scores at a run's first or last evaluation."""
    rows = [row for row in read_metrics(folder) if row["kind"] == "eval"]
    step = rows[0 if first else -1]["step"]
    return {row["language"]: row for row in rows if row["step"] == step}


def tokens_per_character(run: Path) -> float:
    """Tokens per Chinese character of the run's text."""
    config = load_run_yaml(run / "run.yaml")
    summary = prepare_cache(config, read_base(config.model.path)).summary
    return float(summary["sources"]["sample_zh"]["tokens_per_chinese_character"])


if __name__ == "__main__":
    main()
