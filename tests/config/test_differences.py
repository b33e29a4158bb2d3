"""`merge add=`: text and mappings become differences; what is none is refused in a sentence."""

import re
from pathlib import Path

import pytest

from cqlora.config.differences import DifferenceConfig, parse_differences
from cqlora.errors import ConfigError


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of models whose names hold the signs that divide an entry."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "chat", "Llama-3-8B", "Llama-3-8B-Instruct", "a", "b", "a-b", "2*x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")


@pytest.mark.parametrize(
    "entry, expected",
    [
        ("chat-base", ("chat", "base", 1.0)),
        ("chat - base", ("chat", "base", 1.0)),
        ("0.5*chat-base", ("chat", "base", 0.5)),
        ("-.5 * chat-base", ("chat", "base", -0.5)),
        ("1e-1*chat-base", ("chat", "base", 0.1)),
        ("Llama-3-8B-Instruct-Llama-3-8B", ("Llama-3-8B-Instruct", "Llama-3-8B", 1.0)),
        ("0.5*Llama-3-8B-Instruct-Llama-3-8B", ("Llama-3-8B-Instruct", "Llama-3-8B", 0.5)),
        ({"model": "chat", "minus": "base"}, ("chat", "base", 1.0)),
        ({"model": "2*x", "minus": "base", "weight": 2}, ("2*x", "base", 2.0)),
    ],
)
def test_an_entry_is_a_model_what_is_taken_from_it_and_a_weight(entry, expected):
    (found,) = parse_differences([entry])
    model, minus, weight = expected
    assert found == DifferenceConfig(model=model, minus=minus, weight=weight)


@pytest.mark.parametrize(
    "entries, words",
    [
        ("chat-base", "is no list"),
        (["chat"], "is the difference of no two model folders"),
        (["chat-nowhere"], "is the difference of no two model folders"),
        (["a-b-a"], "can be read in more than one way"),
        ([{"model": "chat"}], "names no two folders"),
        ([{"model": "chat", "minus": "base", "wieght": 1}], "is no difference"),
        ([{"model": "chat", "minus": "base", "weight": "much"}], "is no difference"),
        ([{"model": "chat", "minus": "nowhere"}], "nowhere, which holds no model"),
        (["0*chat-base"], "a weight of 0.0"),
        (["chat-base", "0.5*chat-base"], "twice; give it once"),
    ],
)
def test_what_is_no_difference_is_refused_with_the_forms_that_are(entries, words):
    if entries == ["a-b-a"]:
        Path("b-a").mkdir()
        Path("b-a/config.json").write_text("{}")
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        parse_differences(entries)
    assert "add=" in str(caught.value) and "\n" not in str(caught.value)
