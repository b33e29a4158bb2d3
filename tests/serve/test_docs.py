"""Both languages of the serving page say the same, and what they say is so."""

import re

from cqlora.serve.config import ServeConfig
from tests.conftest import ROOT

PAGES = [ROOT / "docs" / name for name in ("serving.md", "serving.zh-CN.md")]
TEXTS = [page.read_text(encoding="utf-8") for page in PAGES]


def test_both_languages_give_the_same_commands_and_values():
    for pattern in (r"^    .+", r"^\| `?(?:GET|POST|\d{3})[^|]*", r"`[a-z_]+=`", r"\]\((\S+)\)", r"^## "):
        english, chinese = (re.findall(pattern, text, re.M) for text in TEXTS)
        assert english == chinese and english, pattern


def test_the_table_of_keys_holds_the_defaults():
    fields = ServeConfig.__dataclass_fields__
    rows = re.findall(r"^\| `(\w+)=` \| (\d+) \|", TEXTS[0], re.M)
    assert {name: float(value) for name, value in rows} == {
        name: float(fields[name].default) for name in ("slots", "queue", "max_tokens", "timeout", "grace")
    }
    assert set(re.findall(r"`(\w+)=`", TEXTS[0])) >= set(fields)


def test_the_screenshots_are_small():
    for image in re.findall(r"\]\((images/\S+)\)", TEXTS[0]):
        assert (ROOT / "docs" / image).stat().st_size < 200_000
