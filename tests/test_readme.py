"""Both readmes give the same commands, and every one of them composes as printed."""

import re
import shlex

import pytest

from tests.conftest import ROOT, run_verb

READMES = ("README.md", "README.zh-CN.md")


def commands(name: str) -> list[str]:
    """Every `python -m cqlora.VERB …` of a readme, in a block or in a line."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"python -m cqlora\.[^`\n]+", text)


def test_both_languages_give_the_same_commands():
    english, chinese = (commands(name) for name in READMES)
    assert english == chinese
    assert len(english) >= 9


@pytest.mark.parametrize("command", sorted(set(commands("README.md"))))
def test_every_command_composes_as_it_is_printed(command, workspace):
    verb, *arguments = shlex.split(command)[2:]
    arguments = [argument for argument in arguments if argument not in ("--multirun", "--cfg", "job")]
    arguments = [argument.split(",")[0] if "1e-4,3e-4" in argument else argument for argument in arguments]
    assert run_verb(workspace, verb.removeprefix("cqlora."), *arguments, "--cfg", "job").stdout
