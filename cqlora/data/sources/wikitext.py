"""Wikitext to the words of an article: no templates, tables, references, links or other markup left."""

import html
import re

from cqlora.data.records import RowError
from cqlora.errors import DataError

_DROPPED_TAGS = (
    "ref|references|gallery|math|chem|ce|timeline|score|imagemap|syntaxhighlight|source|pre|graph|templatestyles|"
    "mapframe|maplink|hiero|inputbox|table|noinclude|includeonly|indicator|section|categorytree"
)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_EMPTY_TAG = re.compile(rf"<\s*(?:{_DROPPED_TAGS}|nowiki|br|hr|wbr)\b[^<>]*/\s*>|<\s*/?\s*(?:br|hr)\b[^<>]*>", re.I)
_TAG_BLOCK = re.compile(rf"<\s*({_DROPPED_TAGS})\b[^<>]*>.*?<\s*/\s*\1\s*>", re.DOTALL | re.IGNORECASE)
_BRACES = re.compile(r"\{\{|\}\}|\{\||\|\}")
_VARIANT = re.compile(r"-\{(.*?)\}-", re.DOTALL)
_FILE_LINK = re.compile(
    r"\[\[\s*:?\s*(?:File|Image|Category|Media|文件|檔案|档案|圖像|图像|分類|分类)\s*:", re.IGNORECASE
)
_INTERWIKI = re.compile(r"\[\[\s*:?[a-z]{2,3}(?:-[a-z]+)*\s*:[^\[\]|]*\]\]")
_LINK_BRACKETS = re.compile(r"\[\[|\]\]")
_HEADING = re.compile(r"^(={1,6})\s*(.*?)\s*\1\s*$", re.MULTILINE)
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
        DataError: mwparserfromhell is not installed.
        RowError: the markup cannot be parsed.
    """
    text = _COMMENT.sub("", wikitext)
    text = _EMPTY_TAG.sub(lambda match: "\n" if "br" in match[0].lower() else "", text)
    text = drop_blocks(text)
    text = drop_braces(text)
    text = _VARIANT.sub(lambda match: choose_variant(match[1]), text)
    text = drop_sections(text)
    text = drop_file_links(_INTERWIKI.sub("", text))
    text = strip_markup(text)
    return tidy(text)


def drop_blocks(text: str) -> str:
    """Without references, galleries, formulas, source code and their like, nested ones included."""
    while True:
        shorter = _TAG_BLOCK.sub("", text)
        if shorter == text:
            return text
        text = shorter


def drop_braces(text: str) -> str:
    """Without templates `{{…}}` and tables `{|…|}`, nested too; an unclosed one ends with its paragraph."""
    kept: list[str] = []
    depth, position, opened = 0, 0, 0
    for match in _BRACES.finditer(text):
        opens = match[0][0] == "{"
        if not depth and not opens:
            continue
        if opens:
            if not depth:
                kept.append(text[position : match.start()])
                opened = match.start()
            depth += 1
        else:
            depth -= 1
            if not depth:
                position = match.end()
    if depth:
        end = text.find("\n\n", opened)
        kept.append(drop_braces(text[end:]) if end >= 0 else "")
    else:
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


def drop_sections(text: str) -> str:
    """Without the sections that hold references and links, and without headings that nothing follows."""
    kept: list[str] = []
    position, dropped_level = 0, 0
    headings = list(_HEADING.finditer(text))
    for index, match in enumerate([*headings, None]):
        body = text[position : match.start() if match else len(text)]
        previous = headings[index - 1] if index else None
        level = len(previous[1]) if previous else 0
        if dropped_level and level <= dropped_level:
            dropped_level = 0
        if previous and not dropped_level and previous[2].strip().lower() in _DROPPED_SECTIONS:
            dropped_level = level
        if not dropped_level:
            if previous and body.strip():
                kept.append(f"\n\n{previous[2]}\n\n")
            kept.append(body)
        position = match.end() if match else position
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
    """The words of links, lists and styles, by mwparserfromhell."""
    try:
        import mwparserfromhell
    except ImportError:
        raise DataError(
            "a MediaWiki dump needs mwparserfromhell; install it with `pip install cqlora[data]`."
        ) from None
    try:
        code = mwparserfromhell.parse(text, skip_style_tags=True)
        return str(code.strip_code(normalize=True, collapse=False))
    except (mwparserfromhell.parser.ParserError, RecursionError):
        raise RowError("wikitext cannot be parsed") from None


def tidy(text: str) -> str:
    """Without what the passes before leave behind: quotes, stray brackets, empty parentheses, blank lines."""
    text = _QUOTES.sub("", html.unescape(text))
    text = _MAGIC_WORD.sub("", _ANY_TAG.sub("", text))
    text = _TABLE_LINE.sub("", text)
    for remains in ("[[", "]]", "{{", "}}", "{|", "|}"):
        text = text.replace(remains, "")
    text = _BRACKET_START.sub(r"\1", _EMPTY_BRACKETS.sub("", _EMPTY_BRACKETS.sub("", text)))
    text = _SPACE_BEFORE_STOP.sub(r"\1", _SPACES.sub(" ", text))
    lines = (_LIST_MARK.sub("", line.strip()).strip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()
