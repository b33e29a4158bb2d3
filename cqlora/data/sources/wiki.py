"""Encyclopedia articles: rows `{id, url, title, text}`, or the pages of a MediaWiki dump."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cqlora.config.schema import SourceConfig
from cqlora.data.records import Document, Record, RowDropped
from cqlora.data.sources.fields import count_unused, text_field
from cqlora.data.sources.wikitext import article_text

_REDIRECT = re.compile(r"\s*#\s*(?:redirect|重定向|重新導向)", re.IGNORECASE)


def parse_wiki(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """One document: the title, an empty line, the text; a text that already opens with its title keeps one.

    Of a dump's pages, redirects and those outside the article namespace are dropped.

    Raises:
        RowDropped: a redirect, or a page of another namespace.
    """
    if isinstance(row, dict) and "wikitext" in row:
        wikitext = text_field(row, "wikitext") if row["wikitext"] != "" else ""
        if text_field(row, "namespace") != "0":
            raise RowDropped("page outside the article namespace")
        if row.get("redirect") or _REDIRECT.match(wikitext):
            raise RowDropped("redirect")
        text = article_text(wikitext)
        count_unused(row, ("title", "namespace", "redirect", "wikitext"), counts)
    else:
        text = text_field(row, "text").strip()
        count_unused(row, ("title", "text"), counts)
    title = row.get("title")
    title = title.strip() if isinstance(title, str) else ""
    if title and not text.startswith(title + "\n"):
        text = f"{title}\n\n{text}"
    yield Document(text)
