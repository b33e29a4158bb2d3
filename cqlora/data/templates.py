"""Which template a run, an adapter or a model's folder means, as its text; empty is ChatML, written turn by turn."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqlora.base import CARD, read_card
from cqlora.config.choices import Template, Thinking
from cqlora.config.schema import StageConfig
from cqlora.data.chat import CHAT_TEMPLATE, ChatEncoder, chat_template
from cqlora.data.rendered import TemplateEncoder, open_typesetter
from cqlora.data.tokenizer import PlainTokenizer
from cqlora.errors import ModelError
from cqlora.system.documents import NAMED_TEMPLATES, read_object_if_there, read_text, shorten, take

logger = logging.getLogger(__name__)

FORM_KEYS = ("system_prompt", "chat_template", "thinking")
"""What a card says of how conversations were written in training; a key is left out where it says nothing new."""

_KNOWN = Path(__file__).parent / "chat_templates"
_OPEN_WITH = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{%- set messages = [{'role': 'system', 'content': PROMPT}] + messages -%}"
    "{%- endif -%}"
)
_ANSWER_AT_ONCE = "{%- set enable_thinking = enable_thinking if enable_thinking is defined else false -%}"


def read_own_template(folder: Path) -> str:
    """The chat template of a model's folder; empty where it has none.

    As transformers reads it, files of their own come before tokenizer_config.json, and of several templates the one
    named tool_use writes conversations with tools, the default one all others.

    Raises:
        ModelError: what stands in its place is neither a text nor named texts of which one is the default.
    """
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    tool_file = folder / NAMED_TEMPLATES / "tool_use.jinja"
    if os.path.lexists(file):
        return join_templates(read_text(file), read_text(tool_file) if os.path.lexists(tool_file) else None)
    if os.path.lexists(tool_file):
        raise ModelError(f"{tool_file} lies there without {file}, the default one; put that there too.")
    template = read_object_if_there(config).get("chat_template")
    if template is None or isinstance(template, str):
        return template or ""
    named = _list_named(template)
    defaults, tool_uses = ([text for name, text in named if name == kind] for kind in ("default", "tool_use"))
    if len(defaults) == 1 and len(tool_uses) <= 1 and all(isinstance(text, str) for text in (*defaults, *tool_uses)):
        return join_templates(defaults[0], *tool_uses)
    raise ModelError(
        f"{config} has chat_template={shorten(template)} where a text belongs, or named texts of which one is the "
        "default; correct it or fetch it again."
    )


def join_templates(default: str, tool_use: str | None = None) -> str:
    """One template that is `tool_use` where there are tools, and `default` elsewhere."""
    if tool_use is None:
        return default
    # Each begins a line and ends behind an expression, so Jinja trims and strips of it what it would alone.
    either = [text.removesuffix("\n") + "{{ '' }}" for text in (tool_use, default)]
    return "{% if tools %}\n" + either[0] + "{% else %}\n" + either[1] + "{% endif %}"


def _list_named(templates: Any) -> list[tuple[Any, Any]]:
    """Names and texts, of an object or of a list of `{name, template}`."""
    if isinstance(templates, dict):
        return list(templates.items())
    entries = templates if isinstance(templates, list) else []
    return [(entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)]


@dataclass(frozen=True, slots=True)
class ChatForm:
    """How conversations are written, in training and whenever the model is asked."""

    name: Template = Template.chatml
    source: str = ""
    """The template in Jinja; empty is ChatML, which is written turn by turn."""
    thinking: Thinking = Thinking.train
    system_prompt: str = ""
    """Put first where a conversation brings no system message."""

    def describe(self) -> dict[str, Any]:
        """What a card says of it, under FORM_KEYS."""
        said: dict[str, Any] = {"system_prompt": self.system_prompt} if self.system_prompt else {}
        if self.source:
            said["chat_template"] = {"name": self.name.name, "source": self.source}
        return said | ({} if self.thinking is Thinking.train else {"thinking": self.thinking.name})

    def write(self, folder: Path) -> str:
        """The template as other programs are given it for the tokenizer in a folder: its system prompt is its default,
        and so is whether to think."""
        if not self.source:
            return chat_template(self.system_prompt)
        written = self.source
        if self.system_prompt.strip():
            written = _OPEN_WITH.replace("PROMPT", json.dumps(self.system_prompt, ensure_ascii=False)) + written
        at_once = self.thinking is Thinking.drop and open_typesetter(folder, self.source).skips_thought
        return (_ANSWER_AT_ONCE if at_once else "") + written

    def open(self, tokenizer: PlainTokenizer, folder: Path) -> ChatEncoder | TemplateEncoder:
        """What encodes prompts for the tokenizer in a folder.

        Raises:
            ModelError: the tokenizer lacks the template's control tokens.
        """
        return TemplateEncoder(tokenizer, folder, self.source, self.thinking) if self.source else ChatEncoder(tokenizer)

    def fits(self, tokenizer: PlainTokenizer) -> bool:
        """Whether the tokenizer has the tokens of a conversation's turns; another template has been proven."""
        special = tokenizer.special
        return bool(self.source) or (special.turn_start is not None and special.turn_end is not None)


def form_of_stage(stage: StageConfig, folder: Path) -> ChatForm:
    """How a stage on the base in `folder` writes conversations; pretraining writes ChatML.

    Raises:
        ModelError: stage.template=base, and the base has no template.
    """
    name: Template = getattr(stage, "template", Template.chatml)
    if name is Template.auto:
        name = choose_by_base(folder)
    thinking: Thinking = getattr(stage, "thinking", Thinking.train)
    return ChatForm(name, find_source(name, folder), thinking, getattr(stage, "system_prompt", ""))


def find_source(name: Template, folder: Path) -> str:
    """The text of a template that was chosen by name.

    Raises:
        ModelError: it is the base's own, and there is none.
    """
    if name is Template.chatml:
        return ""
    if name is not Template.base:
        return read_text(_KNOWN / f"{name.name}.jinja")
    source = read_own_template(folder)
    if not source:
        raise ModelError(f"{folder} has no chat template of its own; use stage.template=chatml, or another by name.")
    return "" if source == CHAT_TEMPLATE else source


def form_of_card(card: Mapping[str, Any], file: Path) -> ChatForm:
    """What a card says.

    Raises:
        ModelError: it is damaged.
    """
    prompt, template, thinking = (
        card.get(key, default) for key, default in zip(FORM_KEYS, ("", {}, "train"), strict=True)
    )
    if not isinstance(prompt, str):
        raise ModelError(f"{file} has system_prompt={prompt!r}, which is no text; merge or train again.")
    try:
        name, source = (template["name"], template["source"]) if template else ("chatml", "")
        return ChatForm(Template[name], str(source), Thinking[thinking], prompt)
    except (KeyError, TypeError) as error:
        raise ModelError(f"{file} has a damaged chat_template or thinking; merge or train again.") from error


def form_of_adapter(folder: Path, base: Path) -> ChatForm:
    """How an adapter's model is asked: as the adapter was tuned, else as its base is."""
    return form_of_tuning(folder) or form_of_model(base)


def form_of_tuning(folder: Path) -> ChatForm | None:
    """How conversations were written in the instruction tuning that a card tells of; None where it tells of none."""
    card, file = read_card(folder), folder / CARD
    tuned = take(card, "trained_on", file, dict, default={}).get("stage") == "sft"
    return form_of_card(card, file) if tuned or any(key in card for key in FORM_KEYS) else None


def form_of_model(folder: Path) -> ChatForm:
    """How a whole model is asked: as its card says, else in its own template where that passes, else in ChatML."""
    told = form_of_tuning(folder)
    if told is not None:
        return told
    name = choose_by_base(folder)
    return ChatForm(name, find_source(name, folder))


def choose_by_base(folder: Path) -> Template:
    """What template=auto comes to: the base's own where a conversation can be learned in it, else ChatML.

    Why a base's own is passed over is said in the log.
    """
    source = read_own_template(folder)
    if source in ("", CHAT_TEMPLATE):
        return Template.chatml
    try:
        TemplateEncoder(PlainTokenizer(folder), folder, source)
    except ModelError as error:
        logger.warning("%s has a chat template that is passed over for ChatML: %s", folder, error)
        return Template.chatml
    return Template.base
