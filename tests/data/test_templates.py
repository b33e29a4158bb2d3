"""Templates that models carry: ids equal to transformers', labels decode to the assistant's words and end tokens."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cqlora.config.choices import SourceKind
from cqlora.config.schema import SourceConfig
from cqlora.data.encode import EncodeSettings, RecordEncoder
from cqlora.data.records import Conversation, RowError, Turn
from cqlora.data.sources import PARSERS, SAMPLE_DIR
from tests.data.template_families import FAMILIES, source_of, stock_tokenizer, write_family

ASKED = 200
"""Conversations of the shared text that every template is held to."""
CALL = json.dumps([{"name": "get_weather", "arguments": {"city": "北京"}}], ensure_ascii=False)
TOOLS = json.dumps([{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}])


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, tmp_path_factory):
    """A family's name and its base."""
    name = request.param
    return name, write_family(tmp_path_factory.mktemp("family") / name, name)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Bases of families by name, each written once."""
    made = {}

    def find(name):
        if name not in made:
            made[name] = write_family(tmp_path_factory.mktemp("base") / name, name)
        return made[name]

    return find


def bundled() -> list[list[Turn]]:
    """The sample's dialogs, and turns of every kind that any of the templates takes."""
    rows = [json.loads(line) for line in (SAMPLE_DIR / "sample_dialog" / "train.jsonl").read_text("utf-8").splitlines()]
    talks = [[Turn(each["role"], each["text"].strip()) for each in row] for row in rows if len(row) > 1]
    u, a, s = (lambda text, role=role: Turn(role, text) for role in ("user", "assistant", "system"))
    return [
        *talks,
        [u("你好"), a("您好！")],
        [s("请简短。"), u("1 + 1?"), a("2"), u("为什么？\n说说"), a("因为：\n\n- 数\n- 加😀")],
        [s("S"), u("x"), a(" y ".strip())],
        [u("a"), a("b"), u("a"), a("b")],
        [u("{{ x }} {% y %}"), a("[INST] q [/INST]")],
        [a("I begin."), u("?"), a("!")],
        [u("one"), u("two"), a("three")],
    ]


def shared() -> list[list[Turn]]:
    """Conversations of the shared sources, evenly."""
    root = Path(os.environ["CQLORA_DATA"])
    found: list[list[list[Turn]]] = []
    for name, kind in (("sharegpt.json", SourceKind.sharegpt), ("belle.json", SourceKind.belle)):
        text = (root / name).read_text("utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
        found.append([])
        for row in rows:
            try:
                found[-1] += [each.turns for each in PARSERS[kind](row, SourceConfig(kind=kind), Counter())]
            except RowError:
                continue
    trees = map(json.loads, (root / "oasst1.jsonl").read_text("utf-8").splitlines())
    source = SourceConfig(kind=SourceKind.oasst1)
    found.append([each.turns for tree in trees for each in PARSERS[SourceKind.oasst1](tree, source, Counter())])
    taken = [talk for together in zip(*(talks[:100] for talks in found), strict=False) for talk in together]
    return [[turn._replace(text=turn.text.strip()) for turn in talk] for talk in taken]


def check(name, base, talks) -> Counter[str]:
    """Compare conversations with transformers; what became of them."""
    stock, source, counts = stock_tokenizer(base), source_of(name), Counter()
    settings = EncodeSettings(str(base.path), 1 << 20, all_tokens=False, template="" if name == "chatml" else source)
    encoder = RecordEncoder(settings)
    controls = [token.content for token in stock.added_tokens_decoder.values() if token.special]
    for talk in talks:
        if any(control in turn.text for turn in talk for control in controls):
            counts["holds a control token"] += 1
            continue
        messages = [{"role": turn.role, "content": turn.text} for turn in talk]
        try:
            settings.wording.settle(Conversation(talk), Counter())
        except RowError as refusal:
            counts[str(refusal)] += 1
            continue
        expected = stock.apply_chat_template(messages, chat_template=source, return_dict=False)
        batch = encoder.encode([Conversation(talk)])
        assert batch.tokens.tolist() == expected
        check_labels(name, stock, batch, [turn.text for turn in talk if turn.role == "assistant"])
        counts["equal"] += 1
    return counts


def check_labels(name, stock, batch, replies: list[str]) -> None:
    """What is trained, decoded, is the replies, each with its end token; Qwen's last one with the thought, empty
    here, that it has to write first."""
    edges = np.flatnonzero(np.diff(batch.labels.astype(int), prepend=0, append=0)).reshape(-1, 2)
    said = [stock.decode(batch.tokens[start:stop].tolist()) for start, stop in edges]
    end = {"llama3": "<|eot_id|>"}.get(name, "</s>" if FAMILIES[name].sentencepiece else "<|im_end|>")
    assert len(said) == len(replies)
    if name.startswith("qwen"):
        said[-1] = said[-1].removeprefix("<think>\n\n</think>\n\n")
    for found, text in zip(said, replies, strict=True):
        assert found.endswith(end) and found.removesuffix(end).strip() == text


def test_bundled_conversations_give_the_ids_of_transformers_and_labels_are_the_replies(family):
    name, base = family
    counts = check(name, base, bundled())
    assert counts["equal"] >= 10 if name != "mistral_v3" else counts["equal"] >= 6, counts


@pytest.mark.skipif(not os.environ.get("CQLORA_DATA"), reason="CQLORA_DATA names no folder of real conversations")
def test_real_conversations_give_the_ids_of_transformers_and_labels_are_the_replies(family):
    name, base = family
    talks = shared()
    counts = check(name, base, talks)
    print(name, len(talks), dict(counts))
    assert counts["equal"] >= ASKED, counts
    assert sum(counts.values()) - counts["equal"] <= 0.05 * len(talks), counts
