"""README.md of an adapter or a merged model: the model card that hubs show, from what a run has recorded.

Its front matter is YAML as https://huggingface.co/docs/hub/model-cards describes it. It names folders of the machine
nowhere, and the licence is the user's to fill in: it depends on the base's and on that of the data.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import yaml

from cqlora.base import README
from cqlora.config.choices import AdapterMethod, Quantization
from cqlora.config.schema import RunConfig, SourceConfig
from cqlora.errors import ModelError
from cqlora.system.documents import first_words
from cqlora.system.metrics import complete_evaluations

TAGS = ("cqlora", "qlora", "chinese")
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_UNITS = {"zh": ("Chinese", "bits_per_character"), "en": ("English", "bits_per_byte")}
_FRONT = re.compile(r"---\n(.*?)(?:^|\n)---[ \t]*(?:\n+|\Z)", re.DOTALL)
_TOLD = re.compile(r"^## (?:Training|Evaluation)\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
"""What of an adapter's card is true of the model that it is merged into."""
_OF_ADAPTERS, _OF_BASE = ("language", "datasets"), ("license", "license_name", "license_link")
"""What of their front matter is true of it too."""
LICENCE = (
    "To be filled in: give `license:` above a value of https://huggingface.co/docs/hub/repositories-licenses that the "
    "licences of the base and of the data allow."
)


def adapter_page(config: RunConfig, rows: Sequence[dict[str, Any]]) -> str:
    """The card of a run's adapter, from its settled configuration and the lines of its metrics.jsonl."""
    base = name_base(config.model.path)
    front = {"base_model": hub_name(config.model.path), "library_name": "peft", "pipeline_tag": "text-generation",
             "language": languages(rows, config), "datasets": datasets(config), "tags": [*TAGS, "lora"]}  # fmt: skip
    made = f"An adapter for {base}, made by {config.stage.name} with cqlora."
    return render(front, f"{base}: {config.stage.name} on {config.data.name}", {
        "": made,
        "Training": "\n".join(f"- {line}" for line in describe_run(config)),
        "Evaluation": tell_evaluation(rows),
        "Use": tell_use(config),
        "Licence": LICENCE,
    })  # fmt: skip


def merged_page(base: str, runs: Sequence[RunConfig], table: str) -> str:
    """The card of a model that the adapters of runs, one trained on the other, were merged into."""
    front = {"base_model": hub_name(runs[0].model.path), "library_name": "transformers",
             "pipeline_tag": "text-generation", "language": languages([], *runs), "datasets": datasets(*runs),
             "tags": list(TAGS)}  # fmt: skip
    stages = "\n".join(f"- {run.stage.name}: {'; '.join(describe_run(run))}" for run in runs)
    return render(front, f"{base}, taught Chinese", {
        "": "Made with cqlora: adapters, each trained on from the one before, merged into the base.",
        "Training": stages,
        "Evaluation": f"Held-out text that no stage trained on, an in-context probe, and replies:\n\n{table}",
        "Licence": LICENCE,
    })  # fmt: skip


def page_of_merge(name: str, base: Path, library: str, base_page: str, adapter_pages: Sequence[str]) -> str:
    """The card of a merged model, from those of its base and its adapters; an empty page says nothing.

    The base's licence is the merged model's, as far as the base's card names it.
    """
    said = keep(_OF_ADAPTERS, *adapter_pages) | keep(_OF_BASE, base_page)
    front = {
        "base_model": hub_name(str(base)),
        **said,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": list(TAGS),
    }
    ours = [base_page] if "cqlora" in keep(("tags",), base_page).get("tags", []) else []
    sections = [section for page in (*ours, *adapter_pages) for section in _TOLD.findall(page)]
    body = [
        f"# {name}",
        f"Made with cqlora: {name_base(str(base))} with what its adapters learned merged into it.",
        *sections,
    ]
    if "license" not in said:
        body.append(f"## Licence\n\n{LICENCE}")
    return edit_front("\n\n".join(part.strip() for part in body) + "\n", front)


def keep(keys: Sequence[str], *pages: str) -> dict[str, Any]:
    """What pages say of some keys, the last one's word being the last; one that cannot be read says nothing."""
    said: dict[str, Any] = {}
    for page in pages:
        with suppress(ModelError):
            said |= {key: value for key, value in read_front(page, Path(README)).items() if key in keys}
    return said


def read_front(page: str, file: Path) -> dict[str, Any]:
    """The front matter of a page; nothing where it has none.

    Raises:
        ModelError: it is no YAML object.
    """
    found = _FRONT.match(page)
    try:
        front = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise ModelError(f"{file} begins with what is no YAML ({first_words(error)}); correct it.") from error
    if not isinstance(front or {}, dict):
        raise ModelError(f"{file} begins with YAML that is no object; write `key: value` lines between the dashes.")
    return front or {}


def edit_front(page: str, front: dict[str, Any]) -> str:
    """A page with another front matter, without what is empty in it."""
    given = {key: value for key, value in front.items() if value}
    header = yaml.safe_dump(given, allow_unicode=True, sort_keys=False).rstrip()
    return f"---\n{header}\n---\n\n{_FRONT.sub('', page, count=1)}"


def render(front: dict[str, Any], title: str, sections: dict[str, str]) -> str:
    """A page: front matter, a title, and sections by their headings."""
    parts = [f"## {heading}\n\n{text}" if heading else text for heading, text in sections.items()]
    return edit_front("\n\n".join([f"# {title}", *parts]) + "\n", front)


def describe_run(config: RunConfig) -> Iterator[str]:
    """What a run trained, on what and how, a line each."""
    model, stage, lora = config.model, config.stage, config.lora
    held = {Quantization.nf4: "in NF4", Quantization.int8: "in 8 bits", Quantization.none: "in 16 or 32 bits"}
    precision = config.hardware.precision.name
    yield f"base: {name_base(model.path)}, held {held[model.quantization]}, computed in {precision}"
    yield f"data: {config.data.name} ({', '.join(describe_sources(config))})"
    if lora.method is AdapterMethod.none:
        yield f"trained: embeddings ({stage.embeddings.name}) alone"
    else:
        layers = ", ".join(lora.target_modules)
        yield (
            f"trained: {lora.method.name}, rank {lora.rank}, alpha {lora.alpha:g}, layers {layers}; embeddings "
            f"{stage.embeddings.name}"
        )
    length = f"{stage.max_steps} steps" if stage.max_steps is not None else f"{stage.epochs:g} epochs"
    yield (
        f"steps: {length} of {stage.global_batch_size} × {stage.sequence_length} tokens, learning rate "
        f"{stage.learning_rate:g}, {stage.schedule.name}, {stage.warmup_steps} steps of warm-up, "
        f"{stage.optimizer.name}, seed {config.seed}"
    )
    if stage.init_adapter:
        yield "began as an earlier adapter, which it holds"
    if prompt := getattr(stage, "system_prompt", ""):
        yield f"conversations without a system message were trained with: {' '.join(prompt.split())}"


def used_sources(config: RunConfig) -> dict[str, SourceConfig]:
    """The sources that the run's stage reads."""
    return {name: each for name, each in config.data.sources.items() if config.stage.name in each.stages}


def describe_sources(config: RunConfig) -> Iterator[str]:
    """The sources of a run by name, with how much was taken of each."""
    for name, source in used_sources(config).items():
        taken = [f"at most {source.sample:,} documents"] if source.sample else []
        taken += [f"{source.sample_tokens:,} tokens"] if source.sample_tokens else []
        taken += [f"× {source.weight:g}"] if source.weight != 1 else []
        yield " ".join([name, *taken])


def tell_evaluation(rows: Sequence[dict[str, Any]]) -> str:
    """A table of held-out text before and after the run, a row for each source and language."""
    found = complete_evaluations([row for row in rows if row["kind"] == "eval"])
    if len(found) < 2:
        return "No held-out text was scored before and after."
    first, last = min(found), max(found)
    lines = [f"Held-out text at step {first} and step {last}; less is better.", ""]
    lines += ["| | before | after |", "|---|---|---|"]
    after = {(row["source"], row["language"]): row for row in found[last]}
    for row in found[first]:
        then = after.get((row["source"], row["language"]))
        language, unit = _UNITS.get(row["language"], (row["language"], "bits_per_byte"))
        if then is not None and unit in row and unit in then:
            told = f"{language}, {unit.replace('_', ' ')} ({row['source']})"
            lines.append(f"| {told} | {float(row[unit]):.3f} | {float(then[unit]):.3f} |")
    return "\n".join(lines)


def tell_use(config: RunConfig) -> str:
    """Commands and code that take the adapter up; the words in capitals are the reader's to replace."""
    return (
        "```shell\ncqlora chat base=BASE adapter=ADAPTER\n"
        "cqlora merge base=BASE adapter=ADAPTER output_dir=MODEL\n```\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("BASE")\n'
        'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "ADAPTER")\n```\n\n'
        f"BASE is the very {name_base(config.model.path)} that `cqlora.json` names by its fingerprint, ADAPTER this "
        "folder. Nothing was done about harmful, biased or false replies."
    )


def languages(rows: Iterable[dict[str, Any]], *runs: RunConfig) -> list[str]:
    """What was trained on, Chinese first: what was evaluated says it, else what the sources say of themselves."""
    told = {row["language"] for row in rows if row["kind"] == "eval"}
    told = told or {source.language for run in runs for source in used_sources(run).values()}
    return [language for language in ("zh", "en") if language in told or not told & {"zh", "en"}]


def datasets(*runs: RunConfig) -> list[str]:
    """The hub's datasets among the sources of runs."""
    named = [source.dataset for run in runs for source in used_sources(run).values() if not source.path]
    return sorted(set(filter(is_hub_name, named)))


def is_hub_name(name: str) -> bool:
    """Whether a name can be a hub's ORGANISATION/NAME, and is no folder here."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def hub_name(path: str) -> str:
    """ORGANISATION/NAME of a base that lies in the hub's cache; empty for any other folder, whatever it is called."""
    found = next(filter(None, map(_HUB_CACHE.fullmatch, PurePath(path).parts)), None)
    return f"{found[1]}/{found[2]}" if found else ""


def name_base(path: str) -> str:
    """What a base is called: by the hub, else by its folder."""
    return hub_name(path) or PurePath(path).name
