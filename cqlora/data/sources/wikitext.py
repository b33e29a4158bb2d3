"""Wikitext to the words of an article: no templates, tables, references, links or other markup left.

Every rule takes time in proportion to the text, whatever is in it.
"""

import re
from bisect import bisect
from typing import NamedTuple

from cqlora.data.sources.fields import unescape

_DROPPED_TAGS = (
    "ref|references|gallery|math|chem|ce|timeline|score|imagemap|syntaxhighlight|source|pre|graph|templatestyles|"
    "mapframe|maplink|hiero|inputbox|table|noinclude|includeonly|indicator|section|categorytree"
)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_EMPTY_TAG = re.compile(
    rf"<\s*+(?:{_DROPPED_TAGS}|nowiki|br|hr|wbr)\b[^<>]*/\s*>|<\s*+/?\s*+(?:br|hr)\b[^<>]*>", re.IGNORECASE
)
_BLOCK_TAG = re.compile(rf"<\s*+(/?)\s*+({_DROPPED_TAGS})\b[^<>]*>", re.IGNORECASE)
_BRACES = re.compile(r"\{\{|\}\}|\{\||\|\}")
_FILE_LINK = re.compile(
    r"\[\[\s*+:?\s*+(?:File|Image|Category|Media|文件|檔案|档案|圖像|图像|分類|分类)\s*:", re.IGNORECASE
)
_INTERWIKI = re.compile(r"\[\[\s*+:?[a-z]{2,3}(?:-[a-z]+)*\s*+:[^\[\]|]*\]\]")
_LINK = re.compile(r"\[\[([^\[\]]*+)\]\]")
_WEB_LINK = re.compile(r"\[(?:(?:[a-z]{2,10}:)?//|mailto:)[^\s\[\]]*+[^\S\n]*+([^\[\]\n]*+)\]", re.IGNORECASE)
_LINK_BRACKETS = re.compile(r"\[\[|\]\]")
_HEADING_LINE = re.compile(r"^=[^\n]*=[^\S\n]*$", re.MULTILINE)
_QUOTES = re.compile(r"'{2,5}")
_MAGIC_WORD = re.compile(r"__[A-Z]{3,}__")
_ANY_TAG = re.compile(r"</?[A-Za-z][^<>]{0,400}>")
_TABLE_LINE = re.compile(r"^[ \t]*(?:\{\||\|\}|\|-|\|\+|\||!).*$", re.MULTILINE)
_EMPTY_BRACKETS = re.compile(r"[ \t]*(?:\([\s,;:、，；]*\)|（[\s,;:、，；]*）|\[\s*\])")
_BRACKET_START = re.compile(r"([(（])[\s,;、，；]+")
_LIST_MARK = re.compile(r"^[*#:;]+\s*")
_SPACES = re.compile(r"[ \t\u00a0]{2,}")
_SPACE_BEFORE_STOP = re.compile(r"[ \t]+([,.;:!?])(?=\s|$)")
_BLANK_LINES = re.compile(r"\n\s*\n\s*")

_DROPPED_SECTIONS = {
    "references", "external links", "see also", "further reading", "bibliography", "notes", "footnotes",
    "sources", "citations", "notes and references", "works cited", "gallery",
    "参考文献", "参考资料", "参考", "外部链接", "外部連結", "参见", "參見", "注释", "註釋", "脚注",
    "延伸阅读", "延伸閱讀", "參考文獻", "參考資料", "相关条目", "相關條目", "备注", "備註",
}  # fmt: skip


def article_text(wikitext: str) -> str:
    """The article's paragraphs and headings as plain text, an empty line between them.

    Raises:
        RowError: the number of an HTML entity is out of range.
    """
    text = _COMMENT.sub("", wikitext)
    text = _EMPTY_TAG.sub(lambda match: "\n" if "br" in match[0].lower() else "", text)
    text = drop_blocks(text)
    text = drop_braces(text)
    text = choose_variants(text)
    text = drop_sections(text)
    text = drop_file_links(_INTERWIKI.sub("", text))
    text = strip_markup(text)
    return tidy(text)


def drop_blocks(text: str) -> str:
    """Without references, galleries, formulas, source code and their like, each up to the next end of its kind."""
    tags = list(_BLOCK_TAG.finditer(text))
    ends: dict[str, list[int]] = {}
    for match in tags:
        if match[1]:
            ends.setdefault(match[2].lower(), []).append(match.start())
    kept: list[str] = []
    position = 0
    for match in tags:
        if match[1] or match.start() < position:
            continue
        of_kind = ends.get(match[2].lower(), [])
        following = bisect(of_kind, match.end() - 1)
        if following < len(of_kind):
            kept.append(text[position : match.start()])
            position = text.index(">", of_kind[following]) + 1
    kept.append(text[position:])
    return "".join(kept)


def drop_braces(text: str) -> str:
    """Without templates `{{…}}` and tables `{|…|}`, nested too; an unclosed one ends with its paragraph."""
    kept: list[str] = []
    position = 0
    for start, end in match_braces(text):
        if start < position:
            continue
        kept.append(text[position:start])
        if end is None:
            paragraph = text.find("\n\n", start)
            end = paragraph if paragraph >= 0 else len(text)
        position = end
    kept.append(text[position:])
    return "".join(kept)


def match_braces(text: str) -> list[tuple[int, int | None]]:
    """(start, end) of every opening of braces with its closing, in order; an end is None where there is none."""
    ends: dict[int, int | None] = {}
    opened: list[int] = []
    for match in _BRACES.finditer(text):
        if match[0][0] == "{":
            opened.append(match.start())
            ends[match.start()] = None
        elif opened:
            ends[opened.pop()] = match.end()
    return list(ends.items())


def choose_variants(text: str) -> str:
    """The simplified reading in place of each `-{…}-`."""
    kept: list[str] = []
    position = 0
    while (start := text.find("-{", position)) >= 0 and (end := text.find("}-", start + 2)) >= 0:
        kept += [text[position:start], choose_variant(text[start + 2 : end])]
        position = end + 2
    kept.append(text[position:])
    return "".join(kept)


def choose_variant(body: str) -> str:
    """The simplified reading of `-{zh-hans:…; zh-hant:…}-`; conversion rules without text give none."""
    flags, bar, rest = body.rpartition("|")
    if bar and re.fullmatch(r"[A-Za-z;\- ]*", flags):
        if set(flags) & set("TAH-"):
            return ""
        body = rest
    readings = dict(re.findall(r"(zh(?:-\w+)?)\s*:\s*([^;]*)", body))
    for variant in ("zh-hans", "zh-cn", "zh", "zh-sg", "zh-hant", "zh-tw", "zh-hk"):
        if variant in readings:
            return str(readings[variant]).strip()
    return body


class Heading(NamedTuple):
    """A heading's line."""

    start: int
    end: int
    level: int
    title: str


def find_headings(text: str) -> list[Heading]:
    """The headings `== title ==` of a text, in order."""
    headings = []
    for match in _HEADING_LINE.finditer(text):
        line = match[0].rstrip()
        level = min(len(line) - len(line.lstrip("=")), len(line) - len(line.rstrip("=")), 6, len(line) // 2)
        headings.append(Heading(match.start(), match.end(), level, line[level : len(line) - level].strip()))
    return headings


def drop_sections(text: str) -> str:
    """Without the sections that hold references and links, and without headings that nothing follows."""
    kept: list[str] = []
    headings = find_headings(text)
    dropped_level = 0
    for index, heading in enumerate([Heading(0, 0, 0, ""), *headings]):
        body = text[heading.end : headings[index].start if index < len(headings) else len(text)]
        if dropped_level and heading.level <= dropped_level:
            dropped_level = 0
        if heading.level and not dropped_level and heading.title.lower() in _DROPPED_SECTIONS:
            dropped_level = heading.level
        if not dropped_level:
            if heading.level and body.strip():
                kept.append(f"\n\n{heading.title}\n\n")
            kept.append(body)
    return "".join(kept)


def drop_file_links(text: str) -> str:
    """Without links to files and categories, whose captions may hold links themselves."""
    kept: list[str] = []
    position = 0
    while match := _FILE_LINK.search(text, position):
        kept.append(text[position : match.start()])
        depth, position = 0, len(text)
        for bracket in _LINK_BRACKETS.finditer(text, match.start()):
            depth += 1 if bracket[0] == "[[" else -1
            if not depth:
                position = bracket.end()
                break
    kept.append(text[position:])
    return "".join(kept)


def strip_markup(text: str) -> str:
    """The words of links, and what stands between tags."""
    text = _ANY_TAG.sub("", text)
    for _ in range(2):
        # A link's label may hold one link more.
        text = _LINK.sub(lambda match: match[1].partition("|")[2] or match[1].partition("|")[0], text)
    return _WEB_LINK.sub(lambda match: match[1], text)


def tidy(text: str) -> str:
    """Without what the passes before leave behind: quotes, stray brackets, empty parentheses, blank lines."""
    text = _QUOTES.sub("", unescape(text))
    text = _MAGIC_WORD.sub("", _ANY_TAG.sub("", text))
    text = _TABLE_LINE.sub("", text)
    for remains in ("[[", "]]", "{{", "}}", "{|", "|}"):
        text = text.replace(remains, "")
    # Runs of blanks become one before the rules that look at what follows a run.
    text = _SPACES.sub(" ", text)
    text = _BRACKET_START.sub(r"\1", _EMPTY_BRACKETS.sub("", _EMPTY_BRACKETS.sub("", text)))
    text = _SPACE_BEFORE_STOP.sub(r"\1", _SPACES.sub(" ", text))
    lines = (_LIST_MARK.sub("", line.strip()).strip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()
