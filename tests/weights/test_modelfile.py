"""What Ollama is told of a GGUF file writes the conversations that its chat template writes."""

import re
from pathlib import Path

import pytest

from cqlora.config.choices import ModelFormat
from cqlora.data.chat import chat_template
from cqlora.merge import MergeConfig, merge
from cqlora.weights.modelfile import FORMS, recognise, render
from tests.cards import change_card
from tests.weights.adapters import write_adapter, write_tiny_base

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "system", "content": "请用中文。"}, {"role": "user", "content": "你好\n吗？"},
    {"role": "assistant", "content": "好。"}, {"role": "user", "content": "{再见}"},
]  # fmt: skip
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] "
    "%}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% endfor %}"
)
FIRST = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\n\n' %}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + ns.system + message['content'] + ' [/INST]' }}"
    "{% set ns.system = '' %}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LAST = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\n\n' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' + (ns.system if loop.last else '') + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": chat_template(""),
    "chatml_without_thoughts": chat_template("").replace("assistant\n' }}", "assistant\n<think>\n\n</think>\n\n' }}"),
    "llama3": LLAMA3, "llama2": LLAMA2, "mistral": MISTRAL,
    "mistral_without_spaces": FIRST.replace("' [/INST]'", "'[/INST]'"), "mistral_v3": LAST,
}  # fmt: skip
"""As the models of these families bring them."""


def run_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few actions that are written: range, if, else if, end and two fields."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    head, body = template.split("{{- range $i, $_ := .Messages }}")
    loop, tail = body.rsplit("{{ end }}{{ end }}", 1)
    branches = re.findall(r"\{\{ (?:else )?if (.*?) \}\}(.*?)(?=\{\{ else if |\Z)", loop, re.DOTALL)
    text = head
    for place, message in enumerate(messages):
        holds = {
            "(eq $i 1)": place == 1, "(eq (len (slice $.Messages $i)) 1)": place == len(messages) - 1,
            " $.System": bool(system), f'eq .Role "{message["role"]}"': True,
        }  # fmt: skip
        for condition, written in branches:
            known = [part for part in holds if part in condition]
            parts = re.findall(r"\(eq [$]i 1\)|\(eq \(len|[$]\.System|eq \.Role", condition)
            if len(known) == len(parts) and all(holds[part] for part in known):
                text += written.replace("{{ .Content }}", message["content"]).replace("{{ $.System }}", system)
                break
    return text + tail


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("first", [0, 1], ids=["with a system message", "without"])
def test_every_form_in_go_gives_the_text_of_the_template_that_it_is_of(family, first):
    form, bos, system = recognise(TEMPLATES[family], TOKENS)
    assert (form, system) == (FORMS[family], "")
    expected = render(TEMPLATES[family], TOKENS, TALK[first:])
    if expected is None:
        assert family == "mistral" and not first
    else:
        assert run_go(bos + form.in_go(), TALK[first:]) == expected


@pytest.mark.parametrize("prompt", ["请用中文回答。", 'Say "yes".\nOr no.'])
def test_a_system_message_that_the_template_brings_itself_is_the_models(prompt):
    form, bos, system = recognise(chat_template(prompt), TOKENS)
    assert (form, bos, system) == (FORMS["chatml"], "<s>", prompt)


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ messages[0]['content'] }}",
        LLAMA3.replace("<|eot_id|>", "<|eot|>"),
        LLAMA3.replace("'<|start_header_id|>' + message['role']", "'<|start_header_id|>' + message['role'] | upper"),
        chat_template('three """ quotes'),
        "{{ raise_exception('never') }}",
        "",
    ],
)
def test_a_template_that_is_not_quite_a_form_is_none(jinja):
    assert recognise(jinja, TOKENS) is None


def test_beside_a_tuned_model_ollama_is_told_file_template_system_and_stops(tmp_path: Path, capsys):
    base = write_tiny_base(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter")
    change_card(adapter, trained_on={"stage": "sft"}, system_prompt="请用中文回答。")
    options = {"base": str(base), "adapter": str(adapter), "format": ModelFormat.gguf}
    merge(MergeConfig(output_dir=str(tmp_path / "Zh"), **options))
    turns = "".join(
        f'{{{{ {word}if eq .Role "{role}" }}}}<|im_start|>{role}\n{{{{ .Content }}}}<|im_end|>\n'
        for word, role in (("", "system"), ("else ", "user"), ("else ", "assistant"))
    )
    assert (tmp_path / "Zh" / "Modelfile").read_text(encoding="utf-8") == (
        "FROM ./Zh.f16.gguf\n"
        f'TEMPLATE """<|endoftext|>{{{{- range $i, $_ := .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}'
        '<|im_start|>assistant\n"""\n'
        'SYSTEM """请用中文回答。"""\n'
        'PARAMETER stop "<|im_start|>"\nPARAMETER stop "<|im_end|>"\n'
    )
    assert f"ollama create zh -f {tmp_path}/Zh/Modelfile" in capsys.readouterr().out


def test_without_a_form_there_is_no_modelfile_and_it_is_said(tmp_path: Path, capsys):
    base = write_tiny_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    merge(MergeConfig(base=str(base), output_dir=str(tmp_path / "gguf"), format=ModelFormat.gguf))
    assert not (tmp_path / "gguf" / "Modelfile").exists()
    assert "note: no Modelfile for Ollama, since" in capsys.readouterr().out
