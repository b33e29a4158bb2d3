"""Cleaning: each rule a pure function of text, switched by the configuration and counted."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial

from cqlora.config import CleanConfig
from cqlora.data.language import own_share
from cqlora.data.records import Conversation, Document, Record, RowError, Turn, text_of
from cqlora.errors import DataError

Transform = Callable[[str], str]

REPEATED_LINE_CHARACTERS = 20
"""Shorter lines, such as a closing brace, may come back in a document."""

_SPACES = "\u00a0\u1680\u2000-\u200a\u202f\u205f"
_COMPATIBILITY = re.compile(f"[{_SPACES}\u2028\u2029\u2f00-\u2fd5\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\ufb00-\ufb06]")
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufff0-\ufffb\ufffe\uffff]"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNDECODED = re.compile("[\udc80-\udcff]")

_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,4}", re.ASCII)
_CHINESE_ID = re.compile(r"(?<!\d)[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)")
_US_ID = re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])")
_MOBILE = re.compile(r"(?<!\d)(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?!\d)")
_LANDLINE = re.compile(r"(?<!\d)0\d{2,3}-\d{7,8}(?!\d)")
_INTERNATIONAL = re.compile(r"(?<![\w+])\+\d{1,3}[- ]?(?:\(\d{1,4}\)[- ]?)?\d{2,4}(?:[- ]?\d{2,4}){2,3}(?!\d)")
_AMERICAN = re.compile(r"(?<![\d-])(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}(?![\d-])")


def normalize_unicode(text: str) -> str:
    """NFC, and plain forms of full-width letters and digits, radicals, ligatures and odd spaces.

    Not NFKC, which would turn Chinese punctuation (，：！（）) into ASCII.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        text = _COMPATIBILITY.sub(plain_form, text)
    return text


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
        raise RowError("not UTF-8")
    return _SURROGATE.sub("\ufffd", text)


class Cleaner:
    """The configured rules, applied to one record after another."""

    def __init__(self, config: CleanConfig, language: str) -> None:
        self.config = config
        self.language = language
        self.transforms: list[tuple[str, Transform]] = [("broken characters replaced", mend_surrogates)]
        self.document_transforms: list[tuple[str, Transform]] = []
        if config.normalize_unicode:
            self.transforms.append(("unicode normalised", normalize_unicode))
        if config.strip_control_characters:
            self.transforms.append(("control characters stripped", strip_control_characters))
        if config.to_simplified:
            self.transforms.append(("simplified", simplified_converter()))
        if config.mask_personal_data:
            self.transforms.append(("personal data masked", mask_personal_data))
        if config.drop_repeated_lines:
            self.document_transforms.append(("repeated lines dropped", drop_repeated_lines))

    def clean(self, record: Record, counts: Counter[str]) -> Record:
        """The record with every transform applied; each that changed it is counted."""
        changed: set[str] = set()
        if isinstance(record, Document):
            apply = partial(apply_transforms, self.transforms + self.document_transforms, changed)
            record = Document(apply(record.text).strip())
        else:
            apply = partial(apply_transforms, self.transforms, changed)
            record = Conversation([Turn(turn.role, apply(turn.text).strip()) for turn in record.turns])
        counts.update(changed)
        return record

    def refusal(self, record: Record) -> str | None:
        """The rule that drops the record, or None to keep it."""
        text = text_of(record)
        if isinstance(record, Conversation) and not all(turn.text for turn in record.turns):
            return "empty after cleaning"
        if isinstance(record, Document) and len(text) < self.config.min_characters:
            return "too short"
        if len(text) > self.config.max_characters:
            return "too long"
        threshold = self.config.min_language_share
        if threshold and own_share(text, self.language) < threshold:
            return "other language"
        return None


def apply_transforms(transforms: list[tuple[str, Transform]], changed: set[str], text: str) -> str:
    """`text` after every transform; the names of those that changed it are added to `changed`."""
    for name, transform in transforms:
        result = transform(text)
        if result != text:
            changed.add(name)
        text = result
    return text
