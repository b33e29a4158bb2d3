"""Decoded examples: what is marked as trained is what the mask trains."""

from tokenizers import Tokenizer

from cqlora.base import Base
from cqlora.config.choices import SourceKind
from cqlora.config.schema import SourceConfig
from cqlora.data.cache import prepare_cache
from cqlora.data.examples import Example, pick_examples, render_html
from tests.data.conftest import MakeConfig


def test_examples_come_from_every_source_and_mark_the_assistants_words(byte_base: Base, make_config: MakeConfig):
    sources = {
        "sample_dialog": SourceConfig(kind=SourceKind.dialog),
        "sample_en": SourceConfig(kind=SourceKind.wiki),
    }
    cache = prepare_cache(make_config(sources, stage="sft", length=1024), byte_base)
    examples = pick_examples(cache, Tokenizer.from_file(str(byte_base.tokenizer_file)), per_group=2)
    groups = {(source.name, source.language) for source in cache.sources}
    assert {(example.source, example.language) for example in examples} == groups and len(examples) == 2 * len(groups)
    assert {"zh", "en"} <= {example.language for example in examples}
    talk = next(example for example in examples if example.source == "sample_dialog")
    contexts = [words for trained, words in talk.spans if not trained]
    trained = [words for trained, words in talk.spans if trained]
    assert contexts[0].endswith("<|im_start|>assistant\n")
    assert all(words.endswith("<|im_end|>") for words in trained)


def test_html_shows_markup_as_text():
    page = render_html("a < b", [Example("s", "zh", 3, [(False, "<|im_start|>user\n<b>"), (True, "yes & no")])])
    assert '<span class="context">&lt;|im_start|&gt;user\n&lt;b&gt;</span>' in page
    assert '<span class="trained">yes &amp; no</span>' in page
    assert "<title>a &lt; b</title>" in page


def test_each_text_is_tagged_with_its_language():
    page = render_html("t", [Example("s", "zh", 1, [(True, "直")]), Example("s", "en", 1, [(True, "straight")])])
    assert '<pre lang="zh-Hans"><span class="trained">直' in page
    assert '<pre lang="en"><span class="trained">straight' in page
