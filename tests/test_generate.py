"""Documents that a base writes itself: the same whoever is written beside them, taken up again, and replayed."""

import json

import pytest

from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.data.sources import SAMPLE_DIR
from cqlora.errors import ConfigError
from cqlora.generate import GenerateConfig, describe_documents, generate
from cqlora.model.tiny import build_tiny, read_sample_texts
from tests.conftest import run_verb
from tests.runs import build_once, typed_run


@pytest.fixture(scope="module")
def base(workspace):
    def build(folder):
        config = typed_run(workspace, "stage=pretrain").model
        config.path = str(folder)
        build_tiny(config, read_sample_texts(SAMPLE_DIR), CHAT_TEMPLATE)

    return build_once(workspace / "generating_base", build)


def write(base, output, **settings):
    generate(GenerateConfig(base=str(base), output=str(output), dtype="float32",
                            **{"documents": 6, "max_tokens": 12, "slots": 3, **settings}))  # fmt: skip
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row["text"] for row in rows}


def test_a_document_is_the_same_whoever_is_written_beside_it_and_another_by_another_seed(base, tmp_path):
    together = write(base, tmp_path / "a.jsonl")
    alone = write(base, tmp_path / "b.jsonl", slots=1)
    other = write(base, tmp_path / "c.jsonl", seed=2)
    assert together == alone and set(together) == set(range(6)) and len(set(together.values())) > 3
    assert other != together


def test_cut_in_a_line_it_is_taken_up_to_the_same_documents(base, tmp_path):
    output = tmp_path / "a.jsonl"
    whole = write(base, output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:7])
    assert write(base, output) == whole
    assert output.read_bytes().splitlines(keepends=True)[:3] == lines[:3]
    assert write(base, output, documents=8).keys() == set(range(8))


def test_it_begins_with_what_is_given(base, tmp_path):
    assert all(text.startswith("长江") for text in write(base, tmp_path / "a.jsonl", opening="长江").values())


@pytest.mark.parametrize("changed", [{"seed": 2}, {"temperature": 0.5}, {"opening": "x"}])
def test_documents_of_other_settings_are_not_mixed_into_a_file(changed, base, tmp_path):
    output = tmp_path / "a.jsonl"
    write(base, output, documents=1)
    before = output.read_bytes()
    with pytest.raises(ConfigError, match=f"was written with {next(iter(changed))}="):
        write(base, output, **changed)
    assert output.read_bytes() == before


def test_a_file_that_it_has_not_written_is_left_alone(base, tmp_path):
    output = tmp_path / "mine.jsonl"
    output.write_text('{"text": "mine"}\n')
    with pytest.raises(ConfigError, match="was not written by"):
        write(base, output)
    assert output.read_text() == '{"text": "mine"}\n'


@pytest.mark.parametrize(
    "settings", [{"documents": 0}, {"temperature": 0}, {"top_p": 2.0}, {"output": "a.txt"}, {"slots": 10**9}]
)
def test_what_cannot_be_meant_is_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        GenerateConfig(**{"base": "a", "output": "b.jsonl", **settings})


def test_what_it_prints_replays_the_documents(base, workspace, tmp_path):
    told = run_verb(tmp_path, "generate", f"base={base}", "output=own.jsonl", "documents=40", "max_tokens=60").stdout
    assert "add data.replay=0.2 to the run" in told
    mine = tmp_path / "my_configs" / "data" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    sample = "  sample_zh: {kind: wiki, language: zh, stages: [pretrain]}\n"
    mine.write_text(f"name: mine\nsources:\n{sample}{told.splitlines()[-1]}\n", encoding="utf-8")
    run_verb(tmp_path, "prepare", "stage=pretrain", f"model.path={base}", "hardware=cpu", "tracking=none", "data=mine",
             "data.replay=0.2", "--config-dir", "my_configs")  # fmt: skip
    summary = json.loads(next(tmp_path.glob("cache/*/summary.json")).read_text())
    tokens = {name: found["tokens"] for name, found in summary["sources"].items()}
    assert summary["sources"]["own"]["kept"]["train"] > 0 and tokens["own"] > 0


@pytest.mark.parametrize("damage", [b"\xff", b"[1]", b'{"id": "2", "text": "x"}', b'{"id": 2}', b"[" * 9_999])
def test_a_damaged_line_is_written_anew(damage, base, tmp_path, capfd):
    output = tmp_path / "a.jsonl"
    whole = write(base, output)
    lines = output.read_bytes().splitlines()
    output.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    assert write(base, output) == whole
    assert f"{output}, line 2 is damaged and left out" in " ".join(capfd.readouterr().err.split())


def test_what_the_file_holds_is_said_where_it_is_not_what_was_asked_for():
    assert describe_documents({0: "a", 1: "b"}, 2) == "2 documents"
    assert describe_documents({0: "a", 1: " "}, 1) == (
        "2 documents (1 were asked for), 1 of them empty, which no run reads"
    )
