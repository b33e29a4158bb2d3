"""Small tokenizers with the control tokens of model families, and the templates that these families carry."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cqlora.base import Base
from cqlora.config.choices import Template
from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.data.templates import find_source
from tests.data.conftest import sample_texts, sentence_tokenizer, write_base

TEMPLATES = Path(__file__).parent / "templates"
_NAMED = {"llama2", "llama3", "mistral", "qwen"}


class Family(NamedTuple):
    """What the tokenizer of a family has."""

    special: tuple[str, ...]
    bos: str | None
    eos: str
    plain: tuple[str, ...] = ()
    """Tokens that no model's template shares with its users alone, and that text may hold."""
    sentencepiece: bool = False


_THINKING = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN = Family(_CHATML, None, "<|im_end|>", _THINKING)
_MISTRAL = Family(
    (
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    "<s>",
    "</s>",
    sentencepiece=True,
)
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FAMILIES = {
    "smollm2": Family(_CHATML, "<|im_start|>", "<|im_end|>"),
    "qwen3": _QWEN,
    "mistral_v3": _MISTRAL,
    "chatml": Family(_CHATML, "<|endoftext|>", "<|endoftext|>"),
    "llama2": Family((), "<s>", "</s>", sentencepiece=True),
    "llama3": Family(_LLAMA3, "<|begin_of_text|>", "<|end_of_text|>"),
    "mistral": _MISTRAL,
    "qwen": _QWEN,
}


@cache
def source_of(family: str) -> str:
    """The text of a family's template."""
    if family == "chatml":
        return CHAT_TEMPLATE
    known = Template[family] if family in _NAMED else None
    return find_source(known, Path()) if known else (TEMPLATES / f"{family}.jinja").read_text("utf-8")


def write_family(folder: Path, family: str) -> Base:
    """A base folder with the family's tokenizer, and its template beside it."""
    about = FAMILIES[family]
    if about.sentencepiece:
        tokenizer = sentence_tokenizer()
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=1200, special_tokens=list(about.special), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(sample_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in about.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in about.plain])
    base = write_base(folder, tokenizer, about.bos, about.eos)
    (folder / "chat_template.jinja").write_text(source_of(family), encoding="utf-8")
    return base


def stock_tokenizer(base: Base):
    """The same tokenizer as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    names = json.loads((base.path / "tokenizer_config.json").read_text())
    return PreTrainedTokenizerFast(tokenizer_file=str(base.tokenizer_file), **names)
