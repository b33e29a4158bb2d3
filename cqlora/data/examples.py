"""Documents of a cache as they are trained, decoded: which words are context, which are labels."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from cqlora.data.cache import Pack, TokenCache

_PAGE = """<!doctype html>
<html lang="zh-Hans"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem;
  color: #24292f; background: #fff; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; border-left: 3px solid #d0d7de;
  padding-left: 1rem; }}
h2 {{ font-size: 1rem; }}
.context {{ color: #6e7781; }}
.trained {{ background: #dafbe1; color: #055d20; }}
@media (prefers-color-scheme: dark) {{
  body {{ background: #0d1117; color: #e6edf3; }}
  pre {{ border-color: #30363d; }}
  .context {{ color: #8b949e; }}
  .trained {{ background: #033a16; color: #7ee787; }}
}}
</style></head><body>
<h1>{title}</h1>
<p lang="en"><span class="trained">Trained</span> words are labels; <span class="context">context</span> is read and not
learned.</p>
<p><span class="trained">参与训练</span>的文字是标签；<span class="context">上下文</span>只作输入，不计损失。</p>
{examples}
</body></html>
"""


@dataclass(frozen=True, slots=True)
class Example:
    """One document, or one chunk of a long one."""

    source: str
    language: str
    """`zh`, `en` or `mixed`."""
    tokens: int
    spans: list[tuple[bool, str]]
    """(whether it is trained, words), in order."""


def pick_examples(cache: TokenCache, tokenizer: Tokenizer, per_group: int = 3) -> list[Example]:
    """The first `per_group` training documents of every source in each of its languages."""
    split = cache.splits["train"]
    picked = []
    for number, source in enumerate(cache.sources):
        documents = documents_of(split.packs_of(number, per_group * cache.sequence_length))
        for ids, labels in islice(documents, per_group):
            spans = decode_spans(tokenizer, ids, labels)
            picked.append(Example(source.name, source.language, len(ids), spans))
    return picked


def documents_of(packs: list[Pack]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(token ids, label mask) of every document."""
    for pack in packs:
        ends = np.cumsum(pack.document_lengths)[:-1]
        yield from zip(np.split(pack.token_ids, ends), np.split(pack.label_mask, ends), strict=True)


def decode_spans(tokenizer: Tokenizer, ids: np.ndarray, labels: np.ndarray) -> list[tuple[bool, str]]:
    """The words of each run of tokens that are trained, or not, together."""
    changes = np.flatnonzero(np.diff(labels)) + 1
    runs = zip(np.split(ids, changes), np.split(labels, changes), strict=True)
    return [(bool(flags[0]), tokenizer.decode(run.tolist(), skip_special_tokens=False)) for run, flags in runs]


def render_html(title: str, examples: list[Example]) -> str:
    """A page of the examples that needs no other file."""
    blocks = []
    for example in examples:
        spans = "".join(
            f'<span class="{"trained" if trained else "context"}">{html.escape(words)}</span>'
            for trained, words in example.spans
        )
        heading = f"{html.escape(example.source)} · {example.language} · {example.tokens} tokens"
        # Chinese text under another language's tag is drawn in another language's glyphs.
        language = "en" if example.language == "en" else "zh-Hans"
        blocks.append(f'<h2 lang="en">{heading}</h2>\n<pre lang="{language}">{spans}</pre>')
    return _PAGE.format(title=html.escape(title), examples="\n".join(blocks))
