"""One conversation through training, the engine, the server, a merged model and its GGUF file: the same ids."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from cqlora.base import read_base, read_card
from cqlora.config.choices import GgufType, MergeOnto, ModelFormat, Precision, Template
from cqlora.config.run_yaml import load_run_yaml
from cqlora.config.schema import RunConfig
from cqlora.data.cache import prepare_cache
from cqlora.data.examples import documents_of
from cqlora.engine import LlamaEngine
from cqlora.serve.requests import ChatRequest
from cqlora.serve.service import Service
from cqlora.weights.merge import plan_merge, write_merge
from tests.data.template_families import write_family
from tests.runs import build_base, finish_run, typed_run

TALK = [
    {"role": "user", "content": "长江有多长？"},
    {"role": "assistant", "content": "约 6,300 公里。"},
    {"role": "user", "content": "And the Yellow River?"},
    {"role": "assistant", "content": "约 5,464 公里。\n\n- 第二长"},
]
PROMPT = """请用"中文"回答。"""
WAYS = {
    "Llama 3's own": ("llama3", "base", ()),
    "Qwen 3's own, without thoughts": ("qwen3", "base", ("stage.thinking=drop",)),
    "Qwen 3's own, with a system prompt": ("qwen3", "base", (f"stage.system_prompt='{PROMPT}'",)),
    "Llama 2's by name": (None, "llama2", ("stage.template=llama2", f"stage.system_prompt='{PROMPT}'")),
    "Mistral's by name": (None, "mistral", ("stage.template=mistral",)),
    "ChatML": (None, "chatml", (f"stage.system_prompt='{PROMPT}'",)),
}


class Tuned:
    """A base with a template of its own, and an adapter that a run of one step left."""

    def __init__(self, workspace: Path, folder: Path, family: str | None, *overrides: str) -> None:
        self.base = build_base(workspace, folder / "base", tied=False)
        if family is not None:
            take_tokenizer(self.base, write_family(folder / "family", family).path)
        self.config: RunConfig = typed_run(
            workspace, "stage=sft", "stage.max_steps=1", "model.quantization=none", f"model.path={self.base}",
            f"data.cache_dir={folder / 'cache'}", "data=dialog",
            f"data.sources.dialog.path={write_talks(folder / 'talks')}", "stage.global_batch_size=1", *overrides,
        )  # fmt: skip
        self.run = folder / "run"
        assert finish_run(self.config, self.run) == 0
        self.adapter = self.run / "adapter"

    def merge(self, output: Path, format: ModelFormat) -> Path:
        """The merged model, in one form."""
        merged = plan_merge(self.base, [self.adapter], MergeOnto["16bit"], True, Precision.auto)
        write_merge(merged, output, SimpleNamespace(format=format, gguf_type=GgufType.f16, max_shard_size="1GB"))
        return output


def take_tokenizer(base: Path, family: Path) -> None:
    """Put another tokenizer and its template into a base."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(family / name, base / name)
    for name in ("special_tokens_map.json", "cqlora.json"):
        (base / name).unlink(missing_ok=True)
    settings = json.loads((family / "tokenizer_config.json").read_text())
    ids = {
        token["content"]: token["id"] for token in json.loads((family / "tokenizer.json").read_text())["added_tokens"]
    }
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("config.json", "generation_config.json"):
        config = json.loads((base / name).read_text())
        config |= {f"{kind}_token_id": ids.get(settings[f"{kind}_token"]) for kind in ("bos", "eos")}
        (base / name).write_text(json.dumps(config | {"pad_token_id": None}))


def write_talks(folder: Path) -> Path:
    """A source of two conversations, one of them held out."""
    folder.mkdir()
    for name, talk in (("train", TALK), ("val", TALK[:2])):
        row = json.dumps([{"role": each["role"], "text": each["content"]} for each in talk], ensure_ascii=False)
        (folder / f"{name}.jsonl").write_text(row + "\n", encoding="utf-8")
    return folder


def trained_ids(tuned: Tuned) -> tuple[list[int], list[int]]:
    """Ids and labels of the one conversation in the token cache."""
    train = prepare_cache(tuned.config, read_base(tuned.base)).splits["train"]
    ((ids, labels),) = documents_of([train.pack(number) for number in range(len(train))])
    return ids.tolist(), labels.astype(int).tolist()


@pytest.mark.parametrize("way", WAYS)
def test_every_part_of_the_project_writes_a_conversation_as_it_was_trained(way, workspace, tmp_path):
    family, name, overrides = WAYS[way]
    tuned = Tuned(workspace, tmp_path, family, *overrides)
    assert tuned.config.stage.template is Template[name]
    assert load_run_yaml(tuned.run / "run.yaml").stage.template is Template[name]
    card = read_card(tuned.adapter)
    assert (card.get("chat_template") or {"name": "chatml"})["name"] == name

    ids, labels = trained_ids(tuned)
    first, second = np.flatnonzero(np.diff(labels) == 1) + 1
    engine = LlamaEngine(tuned.adapter, tuned.base)
    # What a reply is asked with is what stood before what trains of it.
    asked, asked_again = (engine.encode_messages(TALK[:count]) for count in (1, 3))
    assert asked_again == ids[:second]
    if "thinking" not in str(overrides):
        assert asked == ids[:first]
    served = SimpleNamespace(engine=engine, check_length=lambda *length: None)
    request = ChatRequest.model_validate({"messages": TALK[:3]})
    assert Service.encode(served, request) == asked_again
    ends = {token for token, label in zip(ids, labels, strict=True) if label} & engine._end_ids
    assert len(ends) == 1

    folder = tuned.merge(tmp_path / "merged", ModelFormat.safetensors)
    whole = LlamaEngine(folder, "", use_lora=False)
    assert whole.encode_messages(TALK[:3]) == asked_again and ends <= whole._end_ids
    stock = AutoTokenizer.from_pretrained(folder)
    settings = {"add_generation_prompt": True, "return_dict": False}
    assert stock.apply_chat_template(TALK[:3], **settings) == asked_again
    assert stock.apply_chat_template(TALK, return_dict=False) == ids
    generation = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends <= set(generation if isinstance(generation, list) else [generation])

    from gguf import GGUFReader

    file = next(tuned.merge(tmp_path / "gguf", ModelFormat.gguf).glob("*.gguf"))
    template = GGUFReader(file).get_field("tokenizer.chat_template").contents()
    own = AutoTokenizer.from_pretrained(tuned.base)
    assert own.apply_chat_template(TALK[:3], chat_template=template, **settings) == asked_again
    assert own.apply_chat_template(TALK, chat_template=template, return_dict=False) == ids
