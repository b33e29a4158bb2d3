"""Templates that models carry: ids equal to transformers', labels decode to the assistant's words and end tokens."""

import gc
import itertools
import json
import multiprocessing
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from cqlora.config.choices import SourceKind, Template, Thinking
from cqlora.config.schema import SourceConfig
from cqlora.data import template
from cqlora.data.encode import EncodeSettings, RecordEncoder
from cqlora.data.layout import Typesetter
from cqlora.data.records import Conversation, RowError, Turn
from cqlora.data.rendered import TemplateEncoder, open_typesetter
from cqlora.data.sources import PARSERS, SAMPLE_DIR
from cqlora.data.template import ChatTemplate, TemplateRefusal
from cqlora.data.templates import ChatForm, choose_by_base, find_source, form_of_card, read_own_template
from cqlora.data.tokenizer import PlainTokenizer, read_controls
from cqlora.data.turn_forms import messages_of, take_apart
from cqlora.data.wording import Wording
from cqlora.errors import DataError, ModelError
from tests.conftest import REAL_DATA
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
    root = Path(REAL_DATA)
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


@pytest.mark.skipif(not REAL_DATA, reason="CQLORA_DATA names no folder of real conversations")
def test_real_conversations_give_the_ids_of_transformers_and_labels_are_the_replies(family):
    name, base = family
    talks = shared()
    counts = check(name, base, talks)
    print(name, len(talks), dict(counts))
    assert counts["equal"] >= ASKED, counts
    assert sum(counts.values()) - counts["equal"] <= 0.05 * len(talks), counts


def test_named_templates_write_what_the_published_formats_do():
    """Those of Qwen 3 in full; the others by hand, from the models' documentation."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for talk in bundled()[:-2]:
        messages = [{"role": turn.role, "content": turn.text} for turn in talk]
        written = {name: ChatTemplate(source_of(name)).render(messages, names) for name in FAMILIES}
        assert written["qwen"] == written["qwen3"]
        assert written["llama3"] == "<s>" + "".join(
            f"<|start_header_id|>{turn.role}<|end_header_id|>\n\n{turn.text}<|eot_id|>" for turn in talk
        )
        system = talk[0].text if talk[0].role == "system" else ""
        said = [turn.text for turn in talk if turn.role != "system"]
        before = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
        pairs = list(zip(said[::2], said[1::2], strict=True))
        asked = [(before if not n else "") + question for n, (question, _) in enumerate(pairs)]
        exchanges = zip(asked, pairs, strict=True)
        assert written["llama2"] == "".join(f"<s>[INST] {q} [/INST] {reply} </s>" for q, (_, reply) in exchanges)
        if not system:
            assert written["mistral"] == written["mistral_v3"]
            assert written["mistral"] == "<s>" + "".join(f"[INST] {q}[/INST] {reply}</s>" for q, reply in pairs)


def test_calls_and_thoughts_are_written_as_qwen_3_writes_them():
    talk = [
        *(Turn("user", "天气?"), Turn("assistant", "<think>\n要查\n</think>\n\n我查。", CALL), Turn("tool", "晴")),
        *(
            Turn("assistant", "", CALL),
            Turn("tool", "雨"),
            Turn("tool", "雪"),
            Turn("assistant", "<think>好</think>雨。"),
        ),
    ]
    for count in range(1, len(talk) + 1):
        messages = messages_of(*take_apart(talk[:count]))
        ours, theirs = (
            ChatTemplate(source_of(name)).render(messages, {}, json.loads(TOOLS)) for name in ("qwen", "qwen3")
        )
        assert ours == theirs


def spans(base, source, talk, tools="", thinking=Thinking.train) -> list[str]:
    """What is trained of a conversation."""
    settings = EncodeSettings(str(base.path), 1 << 20, False, template=source, thinking=thinking)
    settled = settings.wording.settle(Conversation(talk, tools=tools), Counter())
    batch = RecordEncoder(settings).encode([settled])
    edges = np.flatnonzero(np.diff(batch.labels.astype(int), prepend=0, append=0)).reshape(-1, 2)
    tokenizer = PlainTokenizer(base.path).text
    said = [tokenizer.decode(batch.tokens[a:b].tolist(), skip_special_tokens=False) for a, b in edges]
    plain = "".join(said).replace("<|im_end|>", "").replace("<|eot_id|>", "")
    assert batch.characters.sum() == len(plain) and batch.utf8_bytes.sum() == len(plain.encode())
    return said


THOUGHT = [Turn("user", "q"), Turn("assistant", "<think>\n想\n</think>\n\n一"), Turn("user", "r"),
           Turn("assistant", "<think>\n又想\n</think>\n\n二")]  # fmt: skip


@pytest.mark.parametrize(
    "name, thinking, expected",
    [
        ("qwen3", Thinking.train, ["一<|im_end|>", "<think>\n又想\n</think>\n\n二<|im_end|>"]),
        ("qwen3", Thinking.mask, ["一<|im_end|>", "二<|im_end|>"]),
        ("qwen3", Thinking.drop, ["一<|im_end|>", "二<|im_end|>"]),
        (
            "smollm2",
            Thinking.train,
            [f"<think>\n{t}\n</think>\n\n{w}<|im_end|>" for t, w in (("想", "一"), ("又想", "二"))],
        ),
        ("smollm2", Thinking.mask, ["一<|im_end|>", "二<|im_end|>"]),
        ("smollm2", Thinking.drop, ["一<|im_end|>", "二<|im_end|>"]),
        ("llama3", Thinking.mask, ["一<|eot_id|>", "二<|eot_id|>"]),
        ("chatml", Thinking.mask, ["一<|im_end|>", "二<|im_end|>"]),
        ("chatml", Thinking.drop, ["一<|im_end|>", "二<|im_end|>"]),
    ],
)
def test_thoughts_train_or_are_masked_or_dropped_and_earlier_ones_are_left_out_as_the_template_does(
    name, thinking, expected, bases
):
    source = "" if name == "chatml" else source_of(name)
    assert spans(bases(name), source, THOUGHT, thinking=thinking) == expected


def test_a_model_tuned_without_thoughts_is_asked_past_the_empty_one(bases):
    base, source = bases("qwen3"), source_of("qwen3")
    asked = {
        thinking: TemplateEncoder(PlainTokenizer(base.path), base.path, source, thinking).encode_prompt(THOUGHT[:1])
        for thinking in Thinking
    }
    tokenizer = PlainTokenizer(base.path).text
    tail = {thinking: tokenizer.decode(ids, skip_special_tokens=False)[-30:] for thinking, ids in asked.items()}
    assert tail[Thinking.train] == tail[Thinking.mask] and tail[Thinking.train].endswith("<|im_start|>assistant\n")
    assert tail[Thinking.drop].endswith("assistant\n<think>\n\n</think>\n\n")


TALK_WITH_TOOLS = [Turn("user", "天气?"), Turn("assistant", "", CALL), Turn("tool", "晴"), Turn("assistant", "晴天。")]


@pytest.mark.parametrize("name", ["qwen3", "qwen"])
def test_calls_of_tools_train_and_their_results_do_not(name, bases):
    call, said = spans(bases(name), source_of(name), TALK_WITH_TOOLS, TOOLS)
    assert call == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>'
    assert said.endswith("晴天。<|im_end|>") and "晴</" not in said


def test_calls_of_mistrals_tools_are_ids_of_transformers(bases):
    base = bases("mistral_v3")
    stock, source = stock_tokenizer(base), source_of("mistral_v3")
    settings = EncodeSettings(str(base.path), 1 << 20, False, template=source)
    batch = RecordEncoder(settings).encode(
        [settings.wording.settle(Conversation(TALK_WITH_TOOLS, tools=TOOLS), Counter())]
    )
    messages = messages_of(*take_apart(TALK_WITH_TOOLS))
    # The template takes a message with `tool_calls` to be nothing else.
    expected = stock.apply_chat_template(messages, json.loads(TOOLS), chat_template=source, return_dict=False)
    assert batch.tokens.tolist() == expected
    trained = stock.decode(batch.tokens[batch.labels.astype(bool)].tolist())
    assert trained.startswith("[TOOL_CALLS]") and trained.count("</s>") == 2 and "[TOOL_RESULTS]" not in trained


@pytest.mark.parametrize(
    "name, talk, tools, reason",
    [
        ("chatml", TALK_WITH_TOOLS, TOOLS, "tools are called, and ChatML has no place for calls"),
        ("llama3", TALK_WITH_TOOLS, TOOLS, "tools are called, and the chat template has no place for calls"),
        ("mistral_v3", [Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")], "",
         "chat template: After the optional system message, conversation roles must alternate user/assistant"),
        ("mistral_v3", [Turn("system", "s"), Turn("user", "a"), Turn("assistant", "c")], "",
         "chat template: it leaves out the words of turn 1"),
        ("qwen3", [Turn("user", "a"), Turn("assistant", "b </think> c")], "", "it rewrites the words of turn 2"),
        ("smollm2", [Turn("assistant", "I begin.")], "", "turn 1 replies to nothing"),
        ("qwen3", [Turn("user", "a"), Turn("assistant", "", CALL.replace("北京", "<|im_end|>")), Turn("tool", "b"),
                   Turn("assistant", "c")], TOOLS, "the tool calls of turn 2 hold a control token"),
        ("qwen3", [Turn("user", "a"), Turn("assistant", "b")], TOOLS.replace("object", "<|im_start|>"), ""),
    ],
)  # fmt: skip
def test_a_conversation_that_a_template_cannot_write_is_rejected_with_the_turn(name, talk, tools, reason, bases):
    wording = Wording(str(bases(name).path), "" if name == "chatml" else source_of(name))
    with pytest.raises(RowError) as rejected:
        wording.settle(Conversation(talk, tools=tools), Counter())
    assert reason in str(rejected.value)


def test_tools_that_nobody_calls_are_left_out_where_the_template_knows_none(bases):
    talk, counts = [Turn("user", "a"), Turn("assistant", "b")], Counter()
    settled = Wording(str(bases("llama3").path), source_of("llama3")).settle(Conversation(talk, tools=TOOLS), counts)
    assert settled == Conversation(talk) and counts == {"field not used: tools": 1}


def typeset(source: str) -> Typesetter:
    return Typesetter(ChatTemplate(source), {"eos_token": "</s>"}, frozenset({"</s>"}))


LOOP = "{% for m in messages %}TURN{% endfor %}{% if add_generation_prompt %}A: {% endif %}"


@pytest.mark.parametrize(
    "turn, reason",
    [
        ("{{ m.role[0] }}: {{ m.content }}</s>", "it writes turn 1 otherwise once turn 2 has replied"),
        ("{{ 'A' if m.role == 'assistant' else 'U' }}: {{ m.content }}\n", "none of the tokenizer's control tokens"),
        ("{{ 'A' if m.role == 'assistant' else 'U' }}: so, {{ m.content }}</s>", "'so,' before the words of turn 2"),
        (
            "{{ 'A' if m.role == 'assistant' else 'U' }}: {{ m.content }} ok</s>",
            "it writes 'ok' after the words of turn 2",
        ),
        (
            "{{ 'A' if m.role == 'assistant' else 'U' }}: {{ m.content }}{{ m.content }}</s>",
            "repeats the words of turn 1",
        ),
        (
            "{{ loop.length }}{{ 'A' if m.role == 'assistant' else 'U' }}: {{ m.content }}</s>",
            "it writes turn 1 otherwise",
        ),
        ("{{ messages[loop.revindex0].content }}</s>", "it does not write the turns in order"),
    ],
)
def test_a_template_whose_mask_cannot_be_proven_is_refused_with_the_reason(turn, reason):
    with pytest.raises(ModelError) as refused:
        typeset(LOOP.replace("TURN", turn)).prove()
    assert reason in str(refused.value) and "\n" not in str(refused.value)
    typeset(LOOP.replace("TURN", "{{ 'A' if m.role == 'assistant' else 'U' }}: {{ m.content }}</s>")).prove()


REFUSED = {
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages.append(1) }}": "",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "nested too deeply",
    "{% set n = namespace() %}{% set n.__init__ = 1 %}": "",
    "{{ raise_exception('Nobody speaks.\nNobody.') }}": "Nobody speaks. Nobody.",
    "{{ raise_exception('\x1b[2J\x07red \u202e你') }}": "\\x1b[2J\\x07red \\u202e你",
    "{{ raise_exception('') }}": "TemplateError",
    "{{ raise_exception(' \n ') }}": "TemplateError",
    "{{ raise_exception('\\ud800') }}": "\\ud800",
    "{% set n=namespace() %}{% for i in range(999) %}{% set n.x=[n.x] %}{% endfor %}{{ raise_exception(n.x) }}": "deep",
    "{{ '\\ud800' }}": "it writes half of a surrogate pair",
    "{{ 'a' * 1000000 }}": "it writes more than 16 times what it is given",
    "{{ 1 // 0 }}": "",
    "{{ nothing.at.all }}": "",
    "{% include 'x' %}": "",
    "{{ lipsum(n=100000000) }}": "'lipsum' is undefined",
    "{{ 9 ** (9999 * messages | length) }}": "4300 digits",
}


@pytest.mark.parametrize("source", REFUSED)
def test_a_template_that_asks_for_what_it_may_not_have_ends_in_one_sentence(source):
    with pytest.raises(TemplateRefusal) as refused:
        ChatTemplate(source).render([{"role": "user", "content": "a"}], {})
    assert REFUSED[source] in str(refused.value) and str(refused.value).isprintable() and str(refused.value)


ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x == [n.x] }}"
    "{{ n.x }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ 9 ** 999999999 }}",
    "{{ 9 ** (9 ** 9 ** 9) }}",
    "{{ '%9000000000d' % 1 }}",
    "{{ '{:>9000000000}'.format(1) }}",
    "{{ 'a'.center(9000000000) }}",
    "{{ 'a' | center(9000000000) }}",
    "{{ (['a' * 60000] * 60000) | join }}",
    "{{ (5).to_bytes(9000000000, 'big') }}",
    "{{ strftime_now('%s%Z' * 1000000000) }}",
    "{{ [1] | tojson(indent=9000000000) }}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_no_template_gets_past_its_bounds(source, monkeypatch):
    monkeypatch.setattr(template, "MOST_SECONDS", 0.5)
    monkeypatch.setattr(template, "_PROCESS", template._Process())
    with pytest.raises(ModelError) as refused:
        ChatTemplate(source).render([{"role": "user", "content": "a"}], {})
    template._PROCESS.close()
    assert re.search(r"computes for 0.5 seconds more than|takes more than 1 GiB of memory", str(refused.value))
    assert str(refused.value).endswith("; mend it, or choose another with stage.template=NAME.")


def test_a_template_that_is_slow_for_each_text_is_ended_after_some(monkeypatch):
    monkeypatch.setattr(template, "MOST_SECONDS", 0.5)
    monkeypatch.setattr(template, "_PROCESS", template._Process())
    slow = ChatTemplate("{% for i in range(messages[0].content) %}{% for j in range(9999) %}{% endfor %}{% endfor %}")
    with pytest.raises(ModelError, match=r"computes for 0\.5 seconds more than 0\.02 for each text"):
        for number in range(1000):
            slow.render([{"content": 999 if number else 0}], {})
    template._PROCESS.close()


def test_after_a_template_that_was_ended_others_are_written():
    with pytest.raises(ModelError, match="GiB of memory"):
        ChatTemplate("{{ 'a' | center(9000000000) }}").render([], {})
    kept = ChatTemplate("{{ messages[0].content }}")
    template._PROCESS.child.kill()
    with pytest.raises(ModelError, match=r"ended the process that it runs in \(code -9\)"):
        kept.render([{"content": "a"}], {})
    assert kept.render([{"content": "你\u2028\n"}], {}) == "你\u2028\n"


def test_an_interrupted_text_is_not_taken_for_the_next_one(monkeypatch):
    written = ChatTemplate("{{ messages[0].content }}")
    assert written.render([{"content": "a"}], {}) == "a"
    answers = template._PROCESS.child.stdout

    class Interrupted:
        close = answers.close

        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(template._PROCESS.child, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        written.render([{"content": "b"}], {})
    assert written.render([{"content": "c"}], {}) == "c"


def test_templates_are_written_at_once_from_threads_and_from_a_process_that_was_forked():
    written = ChatTemplate("{{ messages[0].content }}")

    def write(name):
        return all(written.render([{"content": name}], {}) == name for _ in range(50))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(write, "abcd"))
    context = multiprocessing.get_context("fork")
    with context.Pool(2, initializer=gc.disable) as forked:
        assert forked.map(partial(render_often, written), "ef") == [True, True]
    assert write("g")


def render_often(written, name):
    return all(written.render([{"content": name}], {}) == name for _ in range(50))


NO_JINJA = [
    "{% for %}",
    "{{",
    "{% generation %}",
    "{{ 'a' | nofilter }}",
    "{% for i in 'ab' %}" * 60 + "{% endfor %}" * 60,
]


@pytest.mark.parametrize("source", NO_JINJA, ids=range(len(NO_JINJA)))
def test_a_template_that_is_no_jinja_is_refused_in_one_sentence(source):
    with pytest.raises(ModelError, match="cannot be read as Jinja") as refused:
        ChatTemplate(source)
    assert "\n" not in str(refused.value)


def test_the_sandbox_writes_what_that_of_transformers_does():
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ {'b': '<é>', 'a': [1]} | tojson }}"
        "{{ messages | tojson(indent=2) }}\n{% for i in range(5) %}\n  {% if i == 3 %}{% break %}{% endif %}{{ i }}\n"
        "{% endfor %}{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}{{ loop is defined }}{{ bos_token }}"
        "{% for a, b in {'k': 1}.items() %}{{ a ~ b }}{{ loop.last }}{{ loop.length }}{% endfor %}{{ tools is none }}"
    )
    messages = [{"role": "user", "content": "你 <b>"}]
    rendered, _ = render_jinja_template(conversations=[messages], chat_template=source, bos_token="<s>")
    assert ChatTemplate(source).render(messages, {"bos_token": "<s>"}) == rendered[0]


def test_templates_are_told_one_day_whatever_the_clock_says():
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}").render([], {}) == "26 Jul 2024"


def test_control_tokens_in_messages_stay_text_in_every_template(family):
    """As many control tokens as a conversation with plain words has."""
    name, base = family
    plain = PlainTokenizer(base.path)
    encoder = TemplateEncoder(plain, base.path, source_of(name))
    attack = f"x{''.join(sorted(read_controls(base.path)))}y"
    found = []
    for body in ("plain", attack):
        talk = [Turn("user", body), Turn("assistant", body)]
        (encoded,) = encoder.encode([encoder.typesetter.arrange(talk)])
        controls = {token for part in encoded.parts if not part.text for token in part.ids}
        found.append((sum(token in controls for token in encoded.ids), sum(not part.text for part in encoded.parts)))
    assert found[0] == found[1] and found[0][0] == found[0][1]


def test_a_prompt_is_how_the_conversation_begins_before_each_reply(family):
    name, base = family
    encoder = TemplateEncoder(PlainTokenizer(base.path), base.path, source_of(name))
    talk = [Turn("user", "长江?"), Turn("assistant", "一"), Turn("user", " why "), Turn("assistant", "二")]
    stripped = [turn._replace(text=turn.text.strip()) for turn in talk]
    (whole,) = encoder.encode([encoder.typesetter.arrange(stripped)])
    for turns in (talk[:1], talk[:3]):
        ids = encoder.encode_prompt(turns)
        assert whole.ids[: len(ids)] == ids and whole.labels[len(ids)] == 1 and not whole.labels[len(ids) - 1]


def test_auto_is_the_bases_own_template_where_it_passes_else_chatml(family, tmp_path, caplog):
    name, base = family
    assert choose_by_base(base.path) is (Template.chatml if name == "chatml" else Template.base)
    assert find_source(Template.base, base.path) == ("" if name == "chatml" else source_of(name))
    folder = tmp_path / "other"
    folder.mkdir()
    for file in base.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert choose_by_base(folder) is Template.chatml and "passed over for ChatML" in caplog.text
    (folder / "chat_template.jinja").unlink()
    assert choose_by_base(folder) is Template.chatml
    with pytest.raises(ModelError, match="has no chat template of its own; use"):
        find_source(Template.base, folder)
    several = ["z", {"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": several}))
    assert read_own_template(folder) == "y"


DEFAULT = {"name": "default", "template": "y"}


@pytest.mark.parametrize("kept", [{"default": "y", "rag": "x"}, "y", [DEFAULT]])
def test_a_template_is_read_as_transformers_reads_it(kept, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": kept}))
    assert read_own_template(tmp_path) == "y"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_own_template(tmp_path) == "file"


@pytest.mark.parametrize(
    "kept",
    [5, True, 0, ["x"], [], [DEFAULT, DEFAULT], [DEFAULT, {"name": "tool_use"}], [{"name": "rag", "template": "x"}],
     {"rag": "x"}, {"default": 1}],
)  # fmt: skip
def test_what_is_no_template_is_refused_and_not_taken_for_none(kept, bases, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(bases("chatml").path, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": kept}))
    for read in (read_own_template, choose_by_base, partial(find_source, Template.base)):
        with pytest.raises(ModelError, match=r"tokenizer_config.json has chat_template=.* where a text belongs"):
            read(folder)


AWKWARD = [
    "\n  {% for m in messages %}\n{{ m.content }}\n  {% endfor %}\n",
    "  {{- messages | length }}x \n\n",
    "{%- if true -%}\n  a {{ tools | length if tools else 'none' }}\n  {%- endif %}   ",
    "y\n",
]


@pytest.mark.parametrize("default, tool_use", list(itertools.permutations(AWKWARD, 2)))
@pytest.mark.parametrize("as_files", [False, True])
def test_a_template_for_tools_writes_what_transformers_writes(default, tool_use, as_files, bases, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(bases("chatml").path, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if as_files:
        (folder / "additional_chat_templates").mkdir()
        (folder / "chat_template.jinja").write_text(default)
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(tool_use)
    else:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        named = [{"name": "default", "template": default}, {"name": "tool_use", "template": tool_use}]
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": named}))
    stock = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": " b\n"}]
    joined = ChatTemplate(read_own_template(folder))
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        expected = stock.apply_chat_template(messages, tools=tools, tokenize=False)
        assert joined.render(messages, {}, tools or ()) == expected


def test_a_template_for_tools_without_the_default_one_is_refused(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    with pytest.raises(ModelError, match=r"tool_use.jinja lies there without .*chat_template.jinja"):
        read_own_template(tmp_path)


def test_a_template_of_tokens_that_the_base_has_not_is_refused(bases):
    with pytest.raises(ModelError, match="ends a reply with none of the tokenizer's control tokens"):
        open_typesetter(bases("llama2").path, source_of("llama3")).prove()


def test_a_prompt_that_the_template_does_not_take_is_refused_in_its_own_words(bases):
    base = bases("mistral_v3")
    encoder = TemplateEncoder(PlainTokenizer(base.path), base.path, source_of("mistral_v3"))
    with pytest.raises(DataError, match="roles must alternate"):
        encoder.encode_prompt([Turn("user", "a"), Turn("user", "b")])


def test_a_template_whose_system_message_says_whether_to_think_is_asked_as_it_was_trained(bases):
    """enable_thinking=false would change what stands before the question (as in SmolLM3's template)."""
    mode = "{{ 'S' if enable_thinking is defined and not enable_thinking else 'T' }}"
    source = mode + LOOP.replace("TURN", "{{ 'A' if m.role == 'assistant' else 'U' }}: {{ m.content }}<|im_end|>")
    base = bases("qwen3")
    asked = [
        TemplateEncoder(PlainTokenizer(base.path), base.path, text, Thinking.drop).encode_prompt([Turn("user", "q")])
        for text in (source, source.replace(mode, "T"))
    ]
    assert asked[0] == asked[1]


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_a_template_that_begins_with_plain_words_gives_the_tokenizers_ids(name, bases):
    base, end = bases(name), "</s>" if name == "llama2" else "<|eot_id|>"
    turn = "{{ 'ASSISTANT' if m.role == 'assistant' else 'USER' }}: {{ m.content }}" + end
    ask = "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    encoder = TemplateEncoder(
        PlainTokenizer(base.path), base.path, "{% for m in messages %}" + turn + "{% endfor %}" + ask
    )
    layout, texts = encoder.typesetter.arrange([Turn("user", "长江 q"), Turn("assistant", "一 a")])
    (encoded,) = encoder.encode([(layout, texts)])
    stock = Tokenizer.from_file(str(base.tokenizer_file))
    assert encoded.ids == stock.encode(layout.fill(texts), add_special_tokens=False).ids
    trained = [token for token, label in zip(encoded.ids, encoded.labels, strict=True) if label]
    assert stock.decode(trained, skip_special_tokens=False).strip() == f"一 a{end}"
    for length in range(1, len(encoded)):
        cut = encoder.cut(encoded, length)
        assert cut.ids == encoded.ids[:length] and cut.labels == encoded.labels[:length]
        assert cut.characters <= encoded.characters


DAMAGED = [
    {"system_prompt": 3},
    {"chat_template": "x"},
    {"chat_template": {"name": "nobody", "source": "x"}},
    {"thinking": "aloud"},
    {"thinking": []},
]


@pytest.mark.parametrize("said", DAMAGED, ids=str)
def test_a_damaged_card_is_told_in_one_sentence(said):
    with pytest.raises(ModelError, match="merge or train again") as refused:
        form_of_card(said, Path("cqlora.json"))
    assert "\n" not in str(refused.value)


def test_a_card_gives_the_form_back_and_says_nothing_of_plain_chatml():
    assert ChatForm().describe() == {}
    forms = [
        ChatForm(Template.base, "{{ x }}", Thinking.drop, "你好"),
        ChatForm(thinking=Thinking.mask),
        ChatForm(system_prompt="x"),
    ]
    for form in forms:
        assert form_of_card(json.loads(json.dumps(form.describe())), Path("cqlora.json")) == form
