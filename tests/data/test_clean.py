"""Each cleaning rule by what it changes, what it leaves, and what it counts."""

from collections import Counter

import pytest

from cqlora.config.schema import CleanConfig
from cqlora.data import clean
from cqlora.data.clean import Cleaner
from cqlora.data.language import detect_language
from cqlora.data.records import Conversation, Document, RowError, Turn


def test_unicode_is_normalised_and_chinese_punctuation_stays():
    assert clean.write_plainly("Ａ１，“好”（吗）！\u00a0x\r\ny ⼀ ﬁ") == "A1，“好”（吗）！ x\ny 一 fi"
    assert clean.compose_characters("e\u0301") == "é"
    cleaner = Cleaner(CleanConfig(min_characters=0), "zh")
    assert cleaner.clean(Document("ｅ\u0301\r\nx"), Counter()) == Document("é\nx")
    assert clean.write_plainly("中文，。：；？！（）《》——…") == "中文，。：；？！（）《》——…"


def test_control_characters_go_and_tabs_newlines_and_emoji_joiners_stay():
    assert clean.strip_control_characters("a\x00b\u200bc\ufeff\td\n👨‍👩") == "abc\td\n👨‍👩"


def test_repeated_lines_go_and_short_ones_may_come_back():
    text = "Menu\nMenu\nA line that is long enough.\n}\nx\n}\nA line that is long enough.\nend"
    assert clean.drop_repeated_lines(text) == "Menu\nA line that is long enough.\n}\nx\n}\nend"
    assert clean.drop_repeated_lines("a\n\nb\n\nc") == "a\n\nb\n\nc"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("写信给 zhang.san@example.com.cn 吧", "写信给 <EMAIL> 吧"),
        ("电话13812345678。", "电话<PHONE>。"),
        ("+86 138-1234-5678", "<PHONE>"),
        ("座机 010-62345678", "座机 <PHONE>"),
        ("call (555) 123-4567 now", "call <PHONE> now"),
        ("+44 20 7946 0958", "<PHONE>"),
        ("身份证11010519491231002X", "身份证<ID>"),
        ("SSN 123-45-6789", "SSN <ID>"),
        ("π is 3.14159265358979 and 2024-01-15 is a date, 1234567890123 a number", None),
    ],
)
def test_personal_data_is_masked_and_other_numbers_are_not(text: str, masked: str | None):
    assert clean.mask_personal_data(text) == (masked or text)


def test_traditional_chinese_becomes_simplified():
    pytest.importorskip("opencc")
    assert clean.simplified_converter()("漢語與臺灣") == "汉语与台湾"


def test_half_a_surrogate_pair_is_replaced_and_undecoded_bytes_are_refused():
    assert clean.mend_surrogates("a\ud83db") == "a\ufffdb"
    with pytest.raises(RowError, match="UTF-8"):
        clean.mend_surrogates("a\udce9b")


def run(
    record: Document | Conversation, language: str = "", **switches: object
) -> tuple[object, str | None, Counter[str]]:
    counts: Counter[str] = Counter()
    cleaner = Cleaner(CleanConfig(**switches), language)
    cleaned = cleaner.clean(record, counts)
    return cleaned, cleaner.refusal(cleaned), counts


def test_every_rule_can_be_switched_off_and_is_counted_once_a_record():
    text = "Ｘ\u200b and mail a@b.co\nA line that is long enough.\nx\nA line that is long enough."
    off = dict.fromkeys(("normalize_unicode", "strip_control_characters", "drop_repeated_lines"), False)
    assert run(Document(text), **off)[0] == Document(text)
    cleaned, _, counts = run(Document(text), mask_personal_data=True)
    assert cleaned == Document("X and mail <EMAIL>\nA line that is long enough.\nx")
    assert counts == {
        "unicode normalised": 1,
        "control characters stripped": 1,
        "repeated lines dropped": 1,
        "personal data masked": 1,
    }


@pytest.mark.parametrize(
    ("record", "language", "switches", "reason"),
    [
        (Document("short"), "", {}, "too short"),
        (Document("x" * 200), "", {"max_characters": 100}, "too long"),
        (Document("mostly Latin letters 中文"), "zh", {"min_language_share": 0.5}, "other language"),
        (Document("全是中文的一句话，没有别的。"), "zh", {"min_language_share": 0.5}, None),
        (Conversation([Turn("user", "2+2?"), Turn("assistant", "4")]), "", {}, None),
        (Conversation([Turn("user", "\u200b"), Turn("assistant", "4")]), "", {}, "empty after cleaning"),
    ],
)
def test_records_are_refused_by_rule(record, language, switches, reason):
    assert run(record, language, **switches)[1] == reason


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("长江是亚洲最长的河流。", "zh"),
        ("使用 apt-get install 安装软件包，然后运行。", "zh"),
        ("The Yangtze is the longest river.", "en"),
        ("Translate 'river' into Chinese: it is 河 or 河流, and 长江 is the Yangtze.", "mixed"),
        ("1234", "mixed"),
    ],
)
def test_language_is_found_by_script(text: str, language: str):
    assert detect_language(text) == language


def test_combining_characters_without_end_are_refused_before_they_are_ordered():
    """Ordering 400,000 of them takes hours; a text that has a hundred in a row is none."""
    cleaner = Cleaner(CleanConfig(), "")
    with pytest.raises(RowError, match="more than 100 combining characters in a row"):
        cleaner.clean(Document("a" + "\u0301\u0323" * 200_000), Counter())
    composed = cleaner.clean(Document("e" + "\u0301" * 100 + "ก" * 300), Counter())
    assert isinstance(composed, Document)
    assert composed.text.startswith("é")
