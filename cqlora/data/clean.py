"""Cleaning: each rule a pure function of text, switched by the configuration and counted."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from cqlora.config.schema import CleanConfig
from cqlora.data.charset import describe_undecodable
from cqlora.data.language import own_share
from cqlora.data.records import Conversation, Document, Record, RowError, Turn, text_of
from cqlora.errors import DataError

Transform = Callable[[str], str]

REPEATED_LINE_CHARACTERS = 20
"""Shorter lines, such as a closing brace, may be repeated in a document."""

_SPACES = "\u00a0\u1680\u2000-\u200a\u202f\u205f"
_COMPATIBLE = f"{_SPACES}\u2028\u2029\u2f00-\u2fd5\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\ufb00-\ufb06"
_CONTROLS = (
    "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064"
    "\ufeff\ufff0-\ufffb\ufffe\uffff"
)
_SURROGATES = "\ud800-\udfff"
_COMPATIBILITY = re.compile(f"[{_COMPATIBLE}]")
_CONTROL = re.compile(f"[{_CONTROLS}]")
_SURROGATE = re.compile(f"[{_SURROGATES}]")
_MOST_MARKS = 100
"""Most combining characters in a row: sorting them takes quadratic time, and no writing has more."""
_MARK_RUN = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0591-\u1dff\u20d0-\u20ff\u2c80-\u2dff\u302a-\u302f\u3099\u309a\ua66f-\uabff\ufb1e\ufe20-\ufe2f"
    f"\U000101fd-\U0001e94a]{{{_MOST_MARKS + 1},}}"
)
"""A superset of the combining characters, letters of some scripts among them."""
_UNDECODED = re.compile("[\udc80-\udcff]")
_UNPAIRED = re.compile("[\ud800-\udc7f\udd00-\udfff]")

_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,4}", re.ASCII)
_CHINESE_ID = re.compile(r"(?<!\d)[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)")
_US_ID = re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])")
_MOBILE = re.compile(r"(?<!\d)(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?!\d)")
_LANDLINE = re.compile(r"(?<!\d)0\d{2,3}-\d{7,8}(?!\d)")
_INTERNATIONAL = re.compile(r"(?<![\w+])\+\d{1,3}[- ]?(?:\(\d{1,4}\)[- ]?)?\d{2,4}(?:[- ]?\d{2,4}){2,3}(?!\d)")
_AMERICAN = re.compile(r"(?<![\d-])(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}(?![\d-])")


def write_plainly(text: str) -> str:
    """Plain forms of full-width letters and digits, radicals, ligatures, odd spaces and ends of lines.

    Not NFKC, which would turn Chinese punctuation (，：！（）) into ASCII.
    """
    return _COMPATIBILITY.sub(plain_form, text.replace("\r\n", "\n").replace("\r", "\n"))


def compose_characters(text: str) -> str:
    """NFC: an accent or a variant that stands by itself joined to its letter.

    Raises:
        RowError: so many accents in a row that it is no text.
    """
    for match in _MARK_RUN.finditer(text):
        marks = 0
        for character in match[0]:
            marks = marks + 1 if unicodedata.combining(character) else 0
            if marks > _MOST_MARKS:
                raise RowError(f"more than {_MOST_MARKS} combining characters in a row")
    return unicodedata.normalize("NFC", text)


def plain_form(match: re.Match[str]) -> str:
    """The ordinary character for a compatibility character."""
    character = match[0]
    return "\n" if character in "\u2028\u2029" else unicodedata.normalize("NFKC", character)


def strip_control_characters(text: str) -> str:
    """Drop control, zero-width, direction and byte-order characters; tab, newline and joiners stay."""
    return _CONTROL.sub("", text)


def drop_repeated_lines(text: str) -> str:
    """Drop a line equal to the one before it, and a long line that has already stood in the text."""
    lines = text.split("\n")
    filled = [words for words in map(str.strip, lines) if words]
    if len(set(filled)) == len(filled):
        return text
    seen: set[str] = set()
    kept: list[str] = []
    for line in lines:
        words = line.strip()
        if words and ((kept and kept[-1].strip() == words) or words in seen):
            continue
        if len(words) >= REPEATED_LINE_CHARACTERS:
            seen.add(words)
        kept.append(line)
    return "\n".join(kept) if len(kept) < len(lines) else text


def mask_personal_data(text: str) -> str:
    """Put <EMAIL>, <ID> and <PHONE> for e-mail addresses, identity numbers and telephone numbers."""
    text = _EMAIL.sub("<EMAIL>", text)
    for pattern in (_CHINESE_ID, _US_ID):
        text = pattern.sub("<ID>", text)
    for pattern in (_MOBILE, _LANDLINE, _INTERNATIONAL, _AMERICAN):
        text = pattern.sub("<PHONE>", text)
    return text


@lru_cache(maxsize=1)
def simplified_converter() -> Transform:
    """OpenCC from traditional to simplified Chinese.

    Raises:
        DataError: OpenCC is not installed.
    """
    try:
        import opencc
    except ImportError:
        raise DataError(
            "data.clean.to_simplified=true needs OpenCC; install it with `pip install cqlora[data]`."
        ) from None
    convert: Transform = opencc.OpenCC("t2s").convert
    return convert


def mend_surrogates(text: str) -> str:
    """Put U+FFFD for halves of surrogate pairs, which UTF-8 cannot hold.

    Raises:
        RowError: the text was read from bytes that are not UTF-8.
    """
    if text.isascii() or not _SURROGATE.search(text):
        return text
    if _UNDECODED.search(text):
        raise RowError(describe_undecodable(_UNPAIRED.sub("", text).encode(errors="surrogateescape")))
    return _SURROGATE.sub("\ufffd", text)


class Rule(NamedTuple):
    """A transform, and the name under which its changes are counted."""

    name: str
    apply: Transform
    characters: str = ""
    """As inside the brackets of a regular expression: it changes no text without one of these; empty: any text."""


class Cleaner:
    """The configured rules, applied to one record after another."""

    def __init__(self, config: CleanConfig, language: str) -> None:
        self.config = config
        self.language = language
        rules = [Rule("broken characters replaced", mend_surrogates, _SURROGATES)]
        if config.normalize_unicode:
            rules.append(Rule("unicode normalised", write_plainly, f"\r{_COMPATIBLE}"))
            rules.append(Rule("unicode normalised", compose_characters))
        if config.strip_control_characters:
            rules.append(Rule("control characters stripped", strip_control_characters, _CONTROLS))
        if config.to_simplified:
            rules.append(Rule("simplified", simplified_converter()))
        if config.mask_personal_data:
            rules.append(Rule("personal data masked", mask_personal_data))
        self.rules = rules
        of_documents = Rule("repeated lines dropped", drop_repeated_lines)
        self.document_rules = [*rules, of_documents] if config.drop_repeated_lines else rules
        self.characters = re.compile("[" + "".join(rule.characters for rule in rules) + "]")
        """Finds any character that one of the rules is about."""

    def clean(self, record: Record, counts: Counter[str]) -> Record:
        """The record with every transform applied; each that changed it is counted."""
        changed: set[str] = set()
        if isinstance(record, Document):
            record = Document(self.apply(self.document_rules, changed, record.text).strip())
        else:
            texts = [self.apply(self.rules, changed, turn.text).strip() for turn in record.turns]
            turns = [
                Turn(turn.role, text, self.clean_calls(changed, turn.calls) if turn.calls else "")
                for turn, text in zip(record.turns, texts, strict=True)
            ]
            record = Conversation(turns, tools=record.tools)
        counts.update(changed)
        return record

    def clean_calls(self, changed: set[str], calls: str) -> str:
        """Tool calls with every rule applied to the texts in them."""

        def apply(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: apply(each) for key, each in value.items()}
            if isinstance(value, list):
                return [apply(each) for each in value]
            return self.apply(self.rules, changed, value) if isinstance(value, str) else value

        return json.dumps(apply(json.loads(calls)), ensure_ascii=False)

    def refusal(self, record: Record) -> str | None:
        """The rule that drops the record, or None to keep it."""
        text = text_of(record)
        if isinstance(record, Conversation) and not all(turn.text or turn.calls for turn in record.turns):
            return "empty after cleaning"
        if isinstance(record, Document) and len(text) < self.config.min_characters:
            return "too short"
        if len(text) > self.config.max_characters:
            return "too long"
        threshold = self.config.min_language_share
        if threshold and own_share(text, self.language) < threshold:
            return "other language"
        return None

    def apply(self, rules: list[Rule], changed: set[str], text: str) -> str:
        """`text` after every rule; the names of those that changed it are added to `changed`."""
        special = self.characters.search(text) is not None
        for rule in rules:
            if rule.characters and not special:
                continue
            result = rule.apply(text)
            if result != text:
                changed.add(rule.name)
                # Composing may produce characters that these rules change.
                special = True
            text = result
        return text
