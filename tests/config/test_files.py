"""Mistakes in one's own YAML under --config-dir: the file, the line, the key, the nearest name; never a traceback."""

import sys
from pathlib import Path

import pytest

from cqlora.cli import run_program
from cqlora.config.schema import RunConfig

HEADER = "# @package _global_\n"

MISTAKES: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {
    "unknown key": ("experiment/mine", HEADER + "stage:\n  lerning_rate: 1", ("line 3", "mean stage.learning_rate?")),
    "unknown key at the top": ("experiment/mine", HEADER + "stge:\n  epochs: 1", ("line 2", "did you mean stage?")),
    "unknown key three deep": (
        "experiment/mine",
        HEADER + "data:\n  clean:\n    min_chars: 4",
        ("line 4", "did you mean data.clean.min_characters?"),
    ),
    "unknown key in braces": ("experiment/mine", HEADER + "lora: {rank: 8, alpah: 3}", ("line 2", "lora.alpha?")),
    "unknown key of a source": (
        "data/mine",
        "name: mine\nsources:\n  a: {kind: wiki, paht: x}",
        ("line 3", "did you mean data.sources.a.path?"),
    ),
    "unknown key of hydra's": ("experiment/mine", HEADER + "hydra:\n  run:\n    dri: x", ("line 4", "hydra.run.dir?")),
    "foreign key": ("experiment/mine", HEADER + "lr: 1e-4", ("line 2", "did you mean stage.learning_rate?")),
    "key that is a number": ("experiment/mine", HEADER + "1: 2", ("line 2", "1 is not a key")),
    "wrong type": ("experiment/mine", HEADER + "stage:\n  epochs: many", ("line 3", "stage.epochs=many", "float")),
    "date": ("experiment/mine", HEADER + "seed: 2001-01-01", ("line 2", "seed=2001-01-01", "integer")),
    "wrong choice": ("experiment/mine", HEADER + "lora:\n  method: lorra", ("line 3", "mean lora.method=lora?")),
    "wrong kind of source": ("data/mine", "name: mine\nsources:\n  a: {kind: wikki}", ("line 3", "kind=wiki?")),
    "null": ("experiment/mine", HEADER + "seed: null", ("line 2", "seed=null")),
    "list for a mapping": ("experiment/mine", HEADER + "stage: [1, 2]", ("line 2", "stage", "key: value")),
    "list for sources": ("data/mine", "name: mine\nsources:\n  - kind: wiki", ("line 2", "data.sources", "key:")),
    "words for a source": ("data/mine", "name: mine\nsources:\n  a: x.jsonl", ("line 3", "data.sources.a", "key:")),
    "nothing for a source": ("data/mine", "name: mine\nsources:\n  a:", ("line 3", "data.sources.a")),
    "mapping for a list": ("experiment/mine", HEADER + "tracking:\n  tags: {a: b}", ("line 3", "[a, b]")),
    "word for a list": ("experiment/mine", HEADER + "lora:\n  target_modules: all", ("line 3", "[a, b]")),
    "list for a number": ("experiment/mine", HEADER + "lora:\n  rank: [1, 2]", ("line 3", "lora.rank", "int")),
    "mapping for a number": ("experiment/mine", HEADER + "lora:\n  rank: {a: 2}", ("line 3", "lora.rank", "int")),
    "source without a kind": (
        "data/mine",
        "name: mine\nsources:\n  a: {path: x}",
        ("line 3", "a.kind", "wiki or text"),
    ),
    "data without a name": (
        "data/mine",
        "sources:\n  a: {kind: wiki}",
        ("mine.yaml, line 1: data.name", "`name: mine`"),
    ),
    "no sources": ("data/mine", "name: mine\nsources: {}", ("data.sources is empty",)),
    "tabs": ("experiment/mine", HEADER + "stage:\n\tepochs: 1", ("line 3", "spaces, not with tabs")),
    "unclosed bracket": ("experiment/mine", HEADER + "lora:\n  target_modules: [a\nseed: 2", ("line 4", "bracket")),
    "unclosed quote": ("experiment/mine", HEADER + "tracking: {group: 'a}", ("line", "close the quote")),
    "duplicate key": ("experiment/mine", HEADER + "seed: 2\nseed: 3", ("line 3", "duplicate key seed", "keep one")),
    "colon in a value": ("experiment/mine", HEADER + "tracking:\n  group: a: b", ("line 3", "quote")),
    "two documents": ("experiment/mine", HEADER + "seed: 2\n---\nseed: 3", ("line 3", "document")),
    "tag of Python's": ("experiment/mine", HEADER + "seed: !!python/object:os.system ls", ("line 2", "constructor")),
    "alias of itself": ("experiment/mine", HEADER + "seed: &a [*a]", ("mine.yaml", "alias")),
    "key that is a list": ("experiment/mine", HEADER + "? [a, b]\n: 3", ("line 2", "unhashable key")),
    "half an interpolation": ("experiment/mine", HEADER + "seed: ${", ("mine.yaml", "'${'")),
    "interpolation of nothing": ("experiment/mine", HEADER + "seed: ${nothing.there}", ("seed", "nothing.there")),
    "list at the top": ("experiment/mine", "- a\n- b", ("mine.yaml", "key: value")),
    "a number at the top": ("experiment/mine", "5", ("mine.yaml", "no configuration")),
    "empty experiment": ("experiment/mine", "", ("mine.yaml", "@package _global_")),
    "empty data": ("data/mine", "", ("mine.yaml, line 1: data.name", "`name: mine`")),
    "no package": ("experiment/mine", "seed: 2", ("mine.yaml", "@package _global_")),
    "package misspelt": ("experiment/mine", "# @package stge\nepochs: 2", ("mine.yaml", "did you mean stage?")),
    "package of nothing": ("experiment/mine", "# @package stage.foo\nepochs: 2", ("mine.yaml", "stage.foo")),
    "package with words after it": ("experiment/mine", "# @package _global_ # x\nseed: 3", ("mine.yaml", "Too many")),
    "missing choice": (
        "experiment/mine",
        HEADER + "defaults:\n  - override /model: llama_6b",
        ("line 3", "did you mean model=llama_65b?"),
    ),
    "missing group": ("experiment/mine", HEADER + "defaults:\n  - override /modle: tiny", ("line 3", "mean model?")),
    "missing override": ("experiment/mine", HEADER + "defaults:\n  - model: tiny", ("line 3", "override /model: tiny")),
    "missing file": ("hardware/mine", "defaults: [4xa100, nothere]\nname: a", ("line 1", "hardware=nothere")),
    "missing GPU": (
        "hardware/mine",
        "defaults: [gpu/h101@_here_]\nname: a",
        ("line 1", "did you mean hardware/gpu=h100? Choices: a100_40g, a100_80g, h100"),
    ),
    "defaults no list": ("experiment/mine", HEADER + "defaults: 5", ("mine.yaml", "defaults must be a list")),
    "binary": ("data/mine", b"\x89PNG\x00\x01", ("mine.yaml", "UTF-8")),
    "zeros": ("data/mine", b"\x00" * 40, ("mine.yaml", "no YAML")),
    "byte order mark": ("experiment/mine", "\ufeff" + HEADER + "seed: 2", ("mine.yaml", "without")),
    "another encoding": ("data/mine", "name: 语料".encode("gbk"), ("mine.yaml", "not UTF-8 text")),
}
"""What is wrong → the file, what is in it, what the sentence says."""


def compose_with(folder: Path, name: str, content: str | bytes, monkeypatch, capfd) -> tuple[int, str]:
    """Exit code and error of a run with one file of one's own."""
    file = folder / f"{name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
    group, _, choice = name.partition("/")
    arguments = ["stage=pretrain", f"{group}={choice}", "--config-dir", str(folder)]
    monkeypatch.setattr(sys, "argv", ["cqlora run", *arguments])
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        run_program("config", RunConfig, lambda config: None)
    return int(ended.value.code or 0), capfd.readouterr().err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_ones_own_file_is_one_sentence_with_file_line_and_name(mistake, tmp_path, monkeypatch, capfd):
    name, content, words = MISTAKES[mistake]
    code, message = compose_with(tmp_path, name, content, monkeypatch, capfd)
    assert code == 2
    assert message.startswith("error: ") and message.count("\n") == 1 and "raised while" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "content",
    [HEADER + "seed: 2", HEADER, HEADER + "defaults:\n  - override /model: tiny\nseed: 2"],
)
def test_a_right_file_composes(content, tmp_path, monkeypatch, capfd):
    assert compose_with(tmp_path, "experiment/mine", content, monkeypatch, capfd) == (0, "")


def test_a_configuration_folder_that_is_not_there_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["cqlora run", "stage=pretrain", "--config-dir", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        run_program("config", RunConfig, lambda config: None)
    message = capfd.readouterr().err
    assert "nowhere" in message and message.count("\n") == 1
