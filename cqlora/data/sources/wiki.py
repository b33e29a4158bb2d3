"""Encyclopedia articles: rows `{id, url, title, text}`, or the pages of a MediaWiki dump."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cqlora.config import SourceConfig
from cqlora.data.records import Document, Record
from cqlora.data.sources.fields import text_field
from cqlora.data.sources.wikitext import article_text

_REDIRECT = re.compile(r"\s*#\s*(?:redirect|重定向|重新導向)", re.IGNORECASE)


def parse_wiki(row: Any, source: SourceConfig, counts: Counter[str]) -> Iterator[Record]:
    """One document: the title, an empty line, the text; a text that already opens with its title keeps one.

    Of a dump's pages, redirects and those outside the article namespace are left out and counted.
    """
    if isinstance(row, dict) and "wikitext" in row:
        if row["namespace"] != "0":
            counts["pages outside the article namespace left out"] += 1
            return
        if row["redirect"] or _REDIRECT.match(row["wikitext"]):
            counts["redirects left out"] += 1
            return
        text = article_text(row["wikitext"])
    else:
        text = text_field(row, "text").strip()
    title = row.get("title")
    title = title.strip() if isinstance(title, str) else ""
    if title and not text.startswith(title + "\n"):
        text = f"{title}\n\n{text}"
    yield Document(text)
