"""Both languages of every page say the same, links lead somewhere, and every printed command is one that runs."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Done

ENGLISH = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if ".zh-CN" not in page.name)]
ALONE = ("architecture.md", "contributing.md", "changelog.md")
"""For those who change the code: in English alone."""
PAIRS = [page for page in ENGLISH if page.name not in ALONE]

NOT_RUN = {
    "cqlora VERB": "a form, not a command",
    "make ": "targets of the Makefile, which CI and the developers call",
    "python -m venv": "done by the Makefile",
    "pip install": "done by the Makefile with other extras",
    "python benchmarks/": "takes minutes to hours; each has its own page",
    "python scripts/": "tests/test_scripts.py runs the wrappers",
    "vllm serve": "another program, for GPUs",
    "llama-cli": "another program",
    "ollama ": "another program",
    "curl ": "tests/serve/test_app.py sends such requests",
    "export ": "shell",
    "ssh ": "shell",
    "git clone": "needs a network",
    "wandb ": "another program",
    "python -m cqlora.run sweep.resume=": "needs a sweep to go on with; tests/sweep has some",
    "optuna-dashboard ": "another program",
}
"""Beginnings of commands that no test composes, and why."""
LEFT_OUT = ("--multirun", "--cfg", "job", "--help", "…")


def in_chinese(page: Path) -> Path:
    return page.with_suffix(".zh-CN.md")


def code_blocks(page: Path) -> list[str]:
    """Fenced and indented blocks, in order."""
    blocks: list[str] = []
    fenced = False
    previous = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
            if fenced:
                blocks.append("")
        elif fenced:
            blocks[-1] += line + "\n"
        elif line.startswith("    ") and (not previous.strip() or previous.startswith("    ")):
            if not previous.startswith("    "):
                blocks.append("")
            blocks[-1] += line[4:] + "\n"
        previous = line
    return blocks


def commands(page: Path) -> list[str]:
    """Every shell command of a page: in blocks, and between backticks where it calls this package."""
    found = []
    for block in code_blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"^(\$ |nohup )", "", line).strip()
            first = line.split(" ")[0]
            starts = first != line and first in {"cqlora", "python", "torchrun", "srun", "sbatch"}
            if starts or line.startswith(tuple(NOT_RUN)):
                found.append(re.sub(r"\s+#.*$", "", line))
    text = page.read_text(encoding="utf-8")
    return found + re.findall(r"`(python -m cqlora\.(?!reference)\w+ [^`]+|cqlora \w+ [^`]+=[^`]+)`", text)


def composable(command: str) -> tuple[str, list[str]] | None:
    """(verb, arguments) of a command of this package, whatever starts it; None for another program."""
    words = shlex.split(re.sub(r" > \S+ 2>&1 &$", "", command))
    if words[0] == "sbatch":
        return "run", words[2:]
    for number, word in enumerate(words):
        if word == "-m" and words[number + 1].startswith("cqlora."):
            return words[number + 1].removeprefix("cqlora."), words[number + 2 :]
    return (words[1], words[2:]) if words[0] == "cqlora" and len(words) > 1 else None


def first_of_sweep(argument: str) -> str:
    """`seed=1,2` as one job has it, and of what a search draws from the first number."""
    key, equals, value = argument.partition("=")
    if drawn := re.match(r"(?:tag|choice|interval|range|int)\(\D*([\d.e+-]+)", value):
        return f"{key}={drawn[1]}"
    return argument if not equals or value[:1] in "[{'\"" else f"{key}={value.split(',')[0]}"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration files that pages tell their reader to write."""
    folder = tmp_path_factory.mktemp("desk")
    for page in ENGLISH:
        for block in code_blocks(page):
            named = re.match(r"# (my_configs/\S+\.yaml)", block)
            if named:
                (folder / named[1]).parent.mkdir(parents=True, exist_ok=True)
                (folder / named[1]).write_text(block, encoding="utf-8")
    return folder


COMMANDS = sorted({command for page in ENGLISH for command in commands(page)})
COMPOSED = [command for command in COMMANDS if not command.startswith(tuple(NOT_RUN))]


@pytest.mark.parametrize("page", PAIRS, ids=lambda page: page.name)
def test_both_languages_have_the_same_headings_blocks_and_commands(page: Path):
    english, chinese = page, in_chinese(page)
    levels = [re.findall(r"^(#+) ", text_without_code(each), re.M) for each in (english, chinese)]
    assert levels[0] == levels[1]
    assert len(code_blocks(english)) == len(code_blocks(chinese))
    assert commands(english) == commands(chinese)


def text_without_code(page: Path) -> str:
    """A page without its fenced blocks, whose comments look like headings."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", [*ENGLISH, *map(in_chinese, PAIRS)], ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("readme", [ROOT / "README.md", ROOT / "README.zh-CN.md"], ids=lambda page: page.name)
def test_every_page_is_linked_from_the_readme_of_its_language(readme: Path):
    text = readme.read_text(encoding="utf-8")
    pages = [*PAIRS, ROOT / "docs" / "architecture.md"] if readme.name == "README.md" else map(in_chinese, PAIRS)
    missing = [page.name for page in pages if page.parent == ROOT / "docs" and f"docs/{page.name}" not in text]
    assert not missing


@pytest.mark.parametrize("command", COMPOSED)
def test_every_command_composes_as_it_is_printed(command: str, desk: Path, call_verb: Callable[..., Done]):
    found = composable(command)
    assert found is not None, f"{command!r} is neither of this package nor listed in NOT_RUN"
    verb, arguments = found
    arguments = [argument for argument in arguments if argument not in LEFT_OUT]
    assert call_verb(desk, verb, *map(first_of_sweep, arguments), "--cfg", "job").stdout


def test_the_site_reads_both_languages_in_the_same_order_and_leaves_no_page_out():
    orders = [
        [page for block in code_blocks(index) for page in re.findall(r"^\w+$", block, re.M)]
        for index in (ROOT / "docs" / "index.md", ROOT / "docs" / "index.zh-CN.md")
    ]
    english, chinese = ([page for page in order if f"{page}.md" not in ALONE] for order in orders)
    assert english == [page for page in chinese if page != "changes"]
    assert {*orders[0], "index"} == {page.stem for page in ENGLISH} - {"README"}


def test_every_file_that_contributing_names_is_there():
    named = re.findall(r"`([\w.-]+/[\w./-]+\.\w+|\.ci/run)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).is_file() and "NAME" not in name]


def test_the_documentation_has_commands_to_check():
    assert len(COMPOSED) > 30
