"""The documentation as a site, built once in each language: `make site`.

`X.md` is a page of the English site, `X.zh-CN.md` the same page of the Chinese one, which lies in a folder within.
Nothing in the pages comes from elsewhere: no font, script or style sheet.
"""

import re
import sys
from gettext import NullTranslations
from itertools import pairwise
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.search import SearchLanguage

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cqlora import __version__  # noqa: E402

chinese = tags.has("chinese")  # type: ignore[name-defined]  # noqa: F821 - Sphinx puts it here
project, release, author = "cqlora", __version__, "cqlora contributors"
language = "zh_CN" if chinese else "en"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".zh-CN.md": "markdown"} if chinese else {".md": "markdown"}
exclude_patterns = [page.name for page in Path(__file__).parent.glob("*.md") if page.match("*.zh-CN.md") != chinese]
myst_heading_anchors = 3
# Blocks are commands and what they print, unless they say what they are; backticks in docstrings are code.
highlight_language = "none"
default_role = "code"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
html_title = "cqlora"
html_theme = "furo"
html_copy_source = False
html_show_sphinx = False
html_use_index = False
html_domain_indices = False
html_show_copyright = False
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "language.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
html_context = {"chinese": chinese}


THEME_WORDS = {"Next": "下一页", "Previous": "上一页", "Home": "首页", "On this page": "本页内容"}


class ThemeWords(NullTranslations):
    """What the theme says in English alone."""

    def gettext(self, message: str) -> str:
        """As NullTranslations'."""
        return THEME_WORDS.get(message, message)


class PairSearch(SearchLanguage):
    """Chinese by its pairs of characters; Sphinx's own way needs a dictionary, and a script that it does not load."""

    lang, language_name = "zh", "Chinese"
    js_splitter_code = r"""
var splitQuery = (query) =>
  (query.match(/[\u4e00-\u9fff]+|\w+/g) ?? []).flatMap((run) =>
    /^[\u4e00-\u9fff]{2}/.test(run) ? Array.from({length: run.length - 1}, (_, n) => run.slice(n, n + 2)) : [run]);
"""

    def split(self, input: str) -> list[str]:
        """The words of a text, in lower case; of Chinese every two characters that stand together."""
        words = re.findall(r"[a-z0-9_]+", input.lower())
        for run in re.findall(r"[\u4e00-\u9fff]+", input):
            words += map("".join, pairwise(run)) if len(run) > 1 else [run]
        return words


def adapt(app: Sphinx, page: str, source: list[str]) -> None:
    """Make a page that is read by itself one of the site's.

    Its link to itself in the other language goes, since the margin of every page has one; a line that ends within a
    Chinese sentence is joined with the next, since a browser puts a space between them.
    """
    text = re.sub(r" ?\[(中文|English)\]\([\w.-]+\.md\)", "", source[0])
    wide = r"[\u2014\u201c\u201d\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(f"({wide})\n(?={wide})", r"\1", part) for part in parts[::2]]
    source[0] = "".join(parts)


def mark_examples(app: Sphinx, kind: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Make an indented block of a docstring the code that it is; to Sphinx it would be a quotation."""
    for number in range(len(lines) - 1, 1, -1):
        before, blank, line = lines[number - 2 : number + 1]
        if line.startswith("    ") and not blank and not before.startswith(" "):
            lines[number - 1 : number] = ["", "::", ""]


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.connect("source-read", adapt)
    # Before napoleon, which indents too.
    app.connect("autodoc-process-docstring", mark_examples, priority=400)
    if chinese:
        app.add_search_language(PairSearch)
        app.connect("builder-inited", lambda app: app.translator.add_fallback(ThemeWords()))
