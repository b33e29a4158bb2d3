"""Wikitext: the words of an article and no markup."""

import bz2
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from cqlora.config.choices import SourceKind
from cqlora.config.schema import SourceConfig
from cqlora.data.records import RowDropped
from cqlora.data.sources import PARSERS, read_rows
from cqlora.data.sources.location import Location, SourceFile
from cqlora.data.sources.wikitext import article_text
from cqlora.errors import DataError

FORBIDDEN = [
    r"\[\[", r"\]\]", r"\{\{", r"\}\}", r"\{\|", r"\|\}", r"^\s*\|", r"^\s*!", r"<ref", r"</", r"<br",
    r"<!--", r"'''", r"^=+.*=+$", r"^[*#:;]", r"&nbsp;", r"&amp;", r"\bthumb\|",
    r"\b(?:File|Image|Category):",
    r"__[A-Z]+__", r"-\{", r"\bcolspan=", r"\bstyle=", r"\[https?:",
]  # fmt: skip
"""What must not remain in an article's text."""

PAGE = """{{Infobox river|name=Yangtze|length={{convert|6300|km}}}}
'''长江'''（{{lang|en|Yangtze}}），是[[亚洲]]最长的[[河流|大河]]。<ref name="a">{{cite}}</ref><!-- n -->
[[File:River.jpg|thumb|A [[river]] and its ''valley''|left]]
It rises on the '''''Tibetan''''' [http://a.b plateau]&nbsp;(, ) in -{zh-cn:中国;zh-tw:中國}-.<br/>Next line.
== Course ==
=== Upper ===
* [[Jinsha River|Jinsha]]
# second <math>x^2</math> item
{| class="wikitable" style="x"
! a !! b
|-
| 1 || {{nested|{{deep}}}}
|}
== Empty ==
== References ==
{{reflist}}
* [http://a.b A book]
=== Sub of references ===
gone
== Legacy ==
Last words. __NOTOC__
[[Category:Rivers]] [[分类:河流]] [[de:Jangtsekiang]]
"""


def forbidden_remains(text: str) -> list[str]:
    return [pattern for pattern in FORBIDDEN if re.search(pattern, text, re.MULTILINE)]


def test_an_article_keeps_its_words_and_headings_and_nothing_else():
    assert article_text(PAGE) == (
        "长江，是亚洲最长的大河。\n\n"
        "It rises on the Tibetan plateau in 中国.\nNext line.\n\n"
        "Upper\n\nJinsha\nsecond item\n\n"
        "Legacy\n\nLast words."
    )


def test_an_unclosed_template_takes_its_paragraph_and_no_more():
    assert article_text("Before.\n\n{{broken|a=b\n\nAfter [[x]].") == "Before.\n\nAfter x."


def dump(*pages: tuple[str, str, str]) -> bytes:
    body = "".join(
        f"<page><title>{title}</title><ns>{namespace}</ns><revision><text>{text}</text></revision></page>"
        for title, namespace, text in pages
    )
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{body}</mediawiki>'.encode()


def parse_dump(file: Path) -> tuple[list[str], Counter[str]]:
    source, counts = SourceConfig(kind=SourceKind.wiki), Counter[str]()
    rows = read_rows(Location(files=[SourceFile(file, None)]), source)
    texts = []
    for row in rows:
        try:
            texts += [record.text for record in PARSERS[source.kind](row.body, source, counts)]
        except RowDropped as rule:
            counts[str(rule)] += 1
    return texts, counts


def test_a_dump_gives_articles_and_counts_redirects_and_other_namespaces(tmp_path: Path):
    file = tmp_path / "wiki.xml.bz2"
    pages = [
        ("A", "0", "Text of [[A]]."),
        ("B", "0", "#REDIRECT [[A]]"),
        ("T", "1", "talk"),
        ("C", "0", "其他。"),
    ]
    file.write_bytes(bz2.compress(dump(*pages)))
    texts, counts = parse_dump(file)
    assert texts == ["A\n\nText of A.", "C\n\n其他。"]
    assert counts == {"redirect": 1, "page outside the article namespace": 1}


def test_a_truncated_dump_is_named_with_the_offset(tmp_path: Path):
    file = tmp_path / "wiki.xml.bz2"
    whole = bz2.compress(dump(*((f"P{n}", "0", os.urandom(400).hex()) for n in range(2000))))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{file} is damaged or cut short near byte \d+ of {len(whole) // 2}"):
        parse_dump(file)


@pytest.mark.skipif("SHARED_DATA" not in os.environ, reason="needs the real dump: set SHARED_DATA to its folder")
def test_the_real_dump_leaves_no_markup():
    texts, counts = parse_dump(Path(os.environ["SHARED_DATA"], "enwiki-sample.xml.bz2"))
    assert len(texts) == 106
    assert counts["redirect"] == 99
    assert [remains for text in texts if (remains := forbidden_remains(text))] == []


def test_the_forbidden_list_finds_what_it_forbids():
    assert set(forbidden_remains(PAGE)) >= {r"\[\[", r"\{\{", r"<ref", r"^=+.*=+$", r"^\s*\|", r"-\{"}
    assert forbidden_remains(article_text(PAGE)) == []


HOSTILE = {
    "unclosed references": "<ref>x ",
    "unclosed tags": "<b><i ",
    "unclosed variants": "-{a ",
    "unclosed templates": "{{a\n\n",
    "unclosed tables": "{|\n",
    "unclosed links": "[[a|",
    "unclosed files": "[[File:a ",
    "unclosed web links": "[http://a ",
    "blanks": " ",
    "blanks after a bracket": "[[ ",
    "blank lines": "\n ",
    "half headings": "=a\n",
    "quotes": "'",
    "brackets": "( ,",
    "entities": "&#",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_markup_takes_time_in_proportion_to_its_length(name: str):
    """A rule that takes time by the square of it would not come to an end here."""
    unit = HOSTILE[name]
    article_text(f"Before{unit * (400_000 // len(unit))}after")


def test_headings_are_lines_between_signs_of_equal_number():
    text = "a\n== One ==\nb\n=== Two === \nc\n==== Off =\nd\n=e\n== See also ==\nf\n=== g ===\nh\n= Three =\ni"
    assert article_text(text) == "a\n\nOne\n\nb\n\nTwo\n\nc\n\n=== Off\n\nd\n=e\n\nThree\n\ni"


def test_links_give_their_labels():
    text = "[[a]] [[a|b [[c|d]] e]] [http://x.y label] [//x.y z] [mailto:a b] [https://x.y]"
    assert article_text(text) == "a b d e label z b"
