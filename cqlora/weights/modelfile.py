"""A Modelfile beside a GGUF file, by which Ollama prompts the model as its chat template does.

Ollama renders a template in Go's language and none in Jinja. A chat template is taken for one of the forms below
where both write the same conversations, so that a form that is not quite the template's is never written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from cqlora.data.tokenizer import read_special_names
from cqlora.vocab.files import read_tokenizer_files
from cqlora.weights.gguf_vocabulary import begins_with, read_template

MODELFILE = "Modelfile"
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class PromptForm:
    """How a family of templates writes the turns of a conversation, `{}` for the words."""

    system: str
    user: str
    assistant: str
    reply: str
    """What opens the reply that is asked for."""
    stop: tuple[str, ...]
    user_after_system: str = ""
    """Where a system message is written within the first question: that question."""

    def render(self, messages: Messages) -> str:
        """The conversation as text, as Go would give it, up to where the reply begins."""
        texts = [self._form(messages, place).format(each["content"]) for place, each in enumerate(messages)]
        return "".join(texts) + self.reply

    def _form(self, messages: Messages, place: int) -> str:
        role = messages[place]["role"]
        within = role == "user" and place == 1 and messages[0]["role"] == "system"
        form: str = self.user_after_system if within and self.user_after_system else getattr(self, role)
        return form

    def in_go(self) -> str:
        """The same in the language of Go's text/template, over Ollama's `.Messages`."""
        branches = [('eq .Role "system"', self.system)]
        if self.user_after_system:
            branches.append(('and (eq .Role "user") (eq $i 1) $.System', self.user_after_system))
        branches += [('eq .Role "user"', self.user), ('eq .Role "assistant"', self.assistant)]
        written = "{{ else ".join(
            f"if {condition} }}}}{form.replace('{}', '{{ .Content }}')}" for condition, form in branches
        )
        return f"{{{{- range $i, $_ := .Messages }}}}{{{{ {written}{{{{ end }}}}{{{{ end }}}}{self.reply}"


def _alike(turn: str, stop: tuple[str, ...]) -> PromptForm:
    """A form whose turns differ by the name of the role alone."""
    roles = {role: turn.replace("ROLE", role) for role in ("system", "user", "assistant")}
    return PromptForm(**roles, reply=roles["assistant"].partition("{}")[0], stop=stop)


FORMS = {
    "chatml": _alike("<|im_start|>ROLE\n{}<|im_end|>\n", ("<|im_start|>", "<|im_end|>")),
    "llama3": _alike("<|start_header_id|>ROLE<|end_header_id|>\n\n{}<|eot_id|>", ("<|start_header_id|>", "<|eot_id|>")),
    "llama2": PromptForm(
        system="[INST] <<SYS>>\n{}\n<</SYS>>\n\n", user="[INST] {} [/INST]", assistant=" {} </s><s>", reply="",
        stop=("[INST]", "</s>"), user_after_system="{} [/INST]",
    ),
    "mistral": PromptForm(
        system="[INST] {}\n\n", user="[INST] {} [/INST]", assistant=" {}</s>", reply="", stop=("[INST]", "</s>"),
        user_after_system="{} [/INST]",
    ),
    "mistral_v3": PromptForm(
        system="[INST] {}\n\n", user="[INST] {}[/INST]", assistant=" {}</s>", reply="", stop=("[INST]", "</s>"),
        user_after_system="{}[/INST]",
    ),
}  # fmt: skip
"""What Ollama can be told, by the name of the family."""

_TALK = ({"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}, {"role": "user", "content": "Q2"})
_SYSTEM = {"role": "system", "content": "S1"}


def write_modelfile(folder: Path, model: str, base: Path, config: dict[str, Any], template: str = "") -> bool:
    """Write the Modelfile for `folder`/`model`; False, and no file, where the template has none of the forms.

    `base` holds the tokenizer, `config` is config.json; `template` stands in place of the base's own.
    """
    tokens = {f"{kind}_token": text for kind, text in read_special_names(base).items()}
    jinja = template or read_template(base, read_tokenizer_files(base).settings)
    found = recognise(jinja, tokens)
    if found is None:
        return False
    form, bos, system = found
    # llama.cpp puts the token before every prompt where the tokenizer does.
    bos = "" if begins_with(base, config.get("bos_token_id")) else bos
    lines = [f"FROM ./{model}", f'TEMPLATE """{bos}{form.in_go()}"""']
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f'PARAMETER stop "{stop}"' for stop in form.stop]
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return True


def recognise(jinja: str, tokens: Mapping[str, str]) -> tuple[PromptForm, str, str] | None:
    """The form of a chat template, the token that it begins with, and the system message that it brings itself."""
    plain, told = render(jinja, tokens, _TALK), render(jinja, tokens, (_SYSTEM, *_TALK))
    if plain is None:
        return None
    first = tokens["bos_token"] if plain.startswith(tokens.get("bos_token", "\0")) else ""
    for form in FORMS.values():
        bos = "" if form.render(_TALK).startswith(first) else first
        system = own_system(form, plain.removeprefix(bos))
        if system is not None and '"""' not in system and told in (None, bos + form.render((_SYSTEM, *_TALK))):
            return form, bos, system
    return None


def own_system(form: PromptForm, plain: str) -> str | None:
    """The system message that a template gives a conversation without one, empty for none; None: not of this form."""
    if plain == form.render(_TALK):
        return ""
    before, _, after = form.render(({"role": "system", "content": "\0"}, *_TALK)).partition("\0")
    if plain.startswith(before) and plain.endswith(after) and len(plain) > len(before) + len(after):
        return plain[len(before) : len(plain) - len(after)]
    return None


def render(jinja: str, tokens: Mapping[str, str], messages: Messages) -> str | None:
    """A conversation as a chat template writes it; None where it refuses it."""
    options: dict[str, Any] = {"chat_template": jinja, "add_generation_prompt": True, **tokens}
    try:
        rendered: Any = render_jinja_template([[dict(message) for message in messages]], **options)
    except TemplateError:
        return None
    return str(rendered[0][0])
