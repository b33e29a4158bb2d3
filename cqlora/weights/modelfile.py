"""A Modelfile beside a GGUF file, by which Ollama prompts the model as its chat template does.

Ollama renders a template in Go's language and none in Jinja. A chat template is taken for one of the forms below
where both write the same conversations, so that a form that is not quite the template's is never written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cqlora.data.template import ChatTemplate, TemplateRefusal
from cqlora.data.templates import read_own_template
from cqlora.data.tokenizer import read_special_names
from cqlora.errors import ModelError
from cqlora.weights.gguf_vocabulary import begins_with

MODELFILE = "Modelfile"
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class PromptForm:
    """How a family of templates writes the turns of a conversation, `{}` for the words."""

    user: str
    assistant: str
    reply: str
    """What opens the reply that is asked for."""
    stop: tuple[str, ...]
    system: str = ""
    """Empty where a system message is written within a question."""
    question_with_system: str = ""
    """That question, `{system}` for the message."""
    within_last: bool = False
    """It is the last question, and not the first."""

    def render(self, messages: Messages) -> str:
        """The conversation as text, as Go would give it, up to where the reply begins."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        holder = len(messages) - 1 if self.within_last else 1
        texts = []
        for place, message in enumerate(messages):
            within = self.question_with_system and system and message["role"] == "user" and place == holder
            form: str = self.question_with_system if within else getattr(self, message["role"])
            texts.append(form.format(message["content"], system=system))
        return "".join(texts) + self.reply

    def in_go(self) -> str:
        """The same in the language of Go's text/template, over Ollama's `.Messages` and `.System`."""
        place = "(eq (len (slice $.Messages $i)) 1)" if self.within_last else "(eq $i 1)"
        branches = [
            ('eq .Role "system"', self.system),
            (f'and (eq .Role "user") {place} $.System', self.question_with_system),
            ('eq .Role "user"', self.user),
            ('eq .Role "assistant"', self.assistant),
        ]
        written = "{{ else ".join(
            f"if {condition} }}}}{form.format('{{ .Content }}', system='{{ $.System }}')}"
            for condition, form in branches
            if form
        )
        return f"{{{{- range $i, $_ := .Messages }}}}{{{{ {written}{{{{ end }}}}{{{{ end }}}}{self.reply}"


def _alike(turn: str, stop: tuple[str, ...]) -> PromptForm:
    """A form whose turns differ by the name of the role alone."""
    system, user, assistant = (turn.replace("ROLE", role) for role in ("system", "user", "assistant"))
    return PromptForm(user, assistant, assistant.partition("{}")[0], stop, system)


_CHATML = _alike("<|im_start|>ROLE\n{}<|im_end|>\n", ("<|im_start|>", "<|im_end|>"))
_MISTRAL = PromptForm(
    user="[INST] {} [/INST]", assistant=" {}</s>", reply="", stop=("[INST]", "</s>"),
    question_with_system="[INST] {system}\n\n{} [/INST]",
)  # fmt: skip
FORMS = {
    "chatml": _CHATML,
    "chatml_without_thoughts": replace(_CHATML, reply=f"{_CHATML.reply}<think>\n\n</think>\n\n"),
    "llama3": _alike("<|start_header_id|>ROLE<|end_header_id|>\n\n{}<|eot_id|>", ("<|start_header_id|>", "<|eot_id|>")),
    "llama2": PromptForm(
        user="[INST] {} [/INST]", assistant=" {} </s><s>", reply="", stop=("[INST]", "</s>"),
        question_with_system="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{} [/INST]",
    ),
    "mistral": _MISTRAL,
    "mistral_without_spaces": replace(
        _MISTRAL, user="[INST] {}[/INST]", question_with_system="[INST] {system}\n\n{}[/INST]"
    ),
    "mistral_v3": replace(
        _MISTRAL, user="[INST] {}[/INST]", question_with_system="[INST] {system}\n\n{}[/INST]", within_last=True
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
    jinja = template or read_own_template(base)
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
    try:
        return ChatTemplate(jinja).render(messages, tokens, add_generation_prompt=True)
    except (ModelError, TemplateRefusal):
        return None
