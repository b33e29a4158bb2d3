"""An entry of LLaMA-Factory's dataset_info.json, from its mapping to the records that its rows become."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cqlora.config.choices import SourceKind
from cqlora.config.schema import SourceConfig
from cqlora.data.collect import collect_batch
from cqlora.data.records import Conversation, Document, Record, RowDropped, RowError, Turn
from cqlora.data.sources import PARSERS, read_rows
from cqlora.data.sources.location import Location, locate_source
from cqlora.errors import DataError

U, A, S = "user", "assistant", "system"
OPENAI = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def write_info(folder: Path, **said: Any) -> Path:
    (folder / "dataset_info.json").write_text(json.dumps({"zh": said}, ensure_ascii=False), encoding="utf-8")
    return folder


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    texts = {
        ".json": lambda: json.dumps(rows, ensure_ascii=False),
        ".jsonl": lambda: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        ".txt": lambda: "\n".join(row["text"] for row in rows),
    }
    file = folder / name
    if file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(texts[file.suffix](), encoding="utf-8")


def source_of(folder: Path, **options: Any) -> SourceConfig:
    return SourceConfig(kind=SourceKind.llama_factory, path=str(folder), dataset="zh", **options)


def parse_all(folder: Path) -> tuple[list[Record], Counter[str]]:
    source, counts = source_of(folder), Counter[str]()
    location = locate_source("mine", source, "")
    rows = read_rows(location, source)
    return [record for row in rows for record in PARSERS[source.kind](row.body, source, counts)], counts


def talk(*turns: tuple[str, str]) -> Conversation:
    return Conversation([Turn(role, text) for role, text in turns])


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_alpacas_columns_may_have_any_names(suffix: str, tmp_path: Path):
    columns = {"prompt": "问题", "query": "补充", "response": "回答", "system": "设定"}
    write_info(tmp_path, file_name=f"data{suffix}", columns=columns)
    write_rows(tmp_path, f"data{suffix}", [{"问题": "q", "补充": "i", "回答": "a", "设定": "s", "编号": "7"}])
    records, counts = parse_all(tmp_path)
    assert records == [talk((S, "s"), (U, "q\ni"), (A, "a"))]
    assert counts == {"field not used: 编号": 1}


def test_without_columns_they_have_alpacas_names_and_columns_that_are_not_named_are_none(tmp_path: Path):
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["b", "c"]]}
    write_rows(tmp_path, "data.json", [row])
    write_info(tmp_path, file_name="data.json")
    assert parse_all(tmp_path)[0] == [talk((U, "q\ni"), (A, "a"))]
    write_info(tmp_path, file_name="data.json", columns={"prompt": "instruction", "response": "output"})
    assert parse_all(tmp_path)[0] == [talk((U, "q"), (A, "a"))]
    write_info(tmp_path, file_name="data.json",
               columns={"prompt": "instruction", "response": "output", "history": "history"})  # fmt: skip
    assert parse_all(tmp_path)[0] == [talk((U, "b"), (A, "c"), (U, "q"), (A, "a"))]


@pytest.mark.parametrize("suffix", [".json", ".txt"])
def test_a_prompt_without_a_reply_is_text_and_each_line_of_a_text_file_a_document(suffix: str, tmp_path: Path):
    write_info(tmp_path, file_name=f"data{suffix}", columns={"prompt": "text"})
    write_rows(tmp_path, f"data{suffix}", [{"text": "长江很长。"}, {"text": "黄河也长。"}])
    assert parse_all(tmp_path)[0] == [Document("长江很长。"), Document("黄河也长。")]


def test_sharegpts_messages_are_read_by_their_tags(tmp_path: Path):
    row = {
        "对话": [
            {"谁": "客户", "说": "q &lt;b&gt;"}, {"谁": "客服", "说": "a"}, {"谁": "客户", "说": "q2"},
            {"谁": "客服", "说": "a2"},
        ],
        "人设": "s",
    }  # fmt: skip
    tags = {"role_tag": "谁", "content_tag": "说", "user_tag": "客户", "assistant_tag": "客服"}
    write_rows(tmp_path, "data.jsonl", [row])
    write_info(tmp_path, file_name="data.jsonl", formatting="sharegpt", tags=tags,
               columns={"messages": "对话", "system": "人设"})  # fmt: skip
    records, counts = parse_all(tmp_path)
    assert records == [talk((S, "s"), (U, "q &lt;b&gt;"), (A, "a"), (U, "q2"), (A, "a2"))]
    assert not counts


def test_openais_messages_are_sharegpts_with_other_tags(tmp_path: Path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"}]  # fmt: skip
    write_rows(tmp_path, "data.json", [{"messages": messages}])
    write_info(tmp_path, file_name="data.json", formatting="sharegpt", columns={"messages": "messages"}, tags=OPENAI)
    assert parse_all(tmp_path)[0] == [talk((S, "s"), (U, "q"), (A, "a"))]


@pytest.mark.parametrize("formatting", ["alpaca", "sharegpt"])
def test_of_a_ranking_entry_the_chosen_reply_trains(formatting: str, tmp_path: Path):
    if formatting == "alpaca":
        row = {"q": "q", "good": "good", "bad": "bad"}
        columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    else:
        said = {who: {"role": "assistant", "content": who} for who in ("good", "bad")}
        row = {"m": [{"role": "user", "content": "q"}], **said}
        columns = {"messages": "m", "chosen": "good", "rejected": "bad"}
    write_rows(tmp_path, "data.json", [row])
    tags = {} if formatting == "alpaca" else {"tags": OPENAI}
    write_info(tmp_path, file_name="data.json", formatting=formatting, ranking=True, columns=columns, **tags)
    records, counts = parse_all(tmp_path)
    assert records == [talk((U, "q"), (A, "good"))]
    assert counts == {"pairs of which the chosen reply alone trains": 1}


@pytest.mark.parametrize("part", ["images", "videos", "audios"])
def test_rows_with_pictures_are_rejected_and_those_without_are_not(part: str, tmp_path: Path):
    write_info(tmp_path, file_name="data.jsonl", columns={"prompt": "q", "response": "a", part: "media"})
    write_rows(tmp_path, "data.jsonl", [{"q": "q", "a": "a", "media": ["x.png"]}, {"q": "q2", "a": "a2", "media": []}])
    source = source_of(tmp_path)
    rows = list(read_rows(locate_source("m", source, ""), source))
    batch = collect_batch(source, '[{"deduplicate": "none"}, "zh"]', None, rows)
    assert batch.rejected == [("data.jsonl", 1, f"has {part}, which a model of text cannot take")]
    assert len(batch.index) == 1


def test_a_reply_that_is_marked_as_bad_is_dropped(tmp_path: Path):
    write_info(tmp_path, file_name="data.json", columns={"prompt": "q", "response": "a", "kto_tag": "good"})
    write_rows(tmp_path, "data.json", [{"q": "q", "a": "a", "good": True}])
    assert parse_all(tmp_path)[0] == [talk((U, "q"), (A, "a"))]
    write_rows(tmp_path, "data.json", [{"q": "q", "a": "a", "good": False}])
    with pytest.raises(RowDropped, match="marked as bad"):
        parse_all(tmp_path)


def test_a_row_that_is_broken_is_rejected_alone(tmp_path: Path):
    write_info(tmp_path, file_name="data.jsonl")
    (tmp_path / "data.jsonl").write_text('{"instruction": \n')
    with pytest.raises(RowError, match="broken JSON"):
        parse_all(tmp_path)


def test_hubs_are_streamed_from_with_the_entrys_columns(tmp_path: Path):
    columns = {"prompt": "q", "response": "a"}
    for key, dataset in (("hf_hub_url", "org/zh"), ("ms_hub_url", "modelscope://org/zh")):
        write_info(tmp_path, **{key: "org/zh"}, subset="part", columns=columns, file_name="ignored.json")
        location = locate_source("mine", source_of(tmp_path), "")
        assert (location.dataset, location.subset, location.files) == (dataset, "part", [])
        assert location.entry is not None and location.entry.columns == columns


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"script_url": "belle"}, r"is made by a script.* \(script_url=belle\); fetch its files"),
        ({"cloud_file_name": "s3://b"}, "lies in a cloud"),
        ({"hf_hub_url": "a/b", "revision": "dev"}, "is a revision of a hub's repository"),
        ({"file_name": "data.json", "split": "test"}, "takes split=test"),
        ({"file_name": "data.json", "num_samples": 5}, "num_samples=5; set the source's sample=N"),
        ({"file_name": "data.json", "formatting": "belle"}, "has formatting=belle"),
        ({"file_name": "data.json", "columns": ["q"]}, "has columns that are no names"),
        ({"file_name": "data.json", "tags": {"role_tag": 5}, "formatting": "sharegpt"}, "has tags that are no names"),
        ({"columns": {}}, "names no file_name, hf_hub_url or ms_hub_url"),
        ({"file_name": "nowhere.json"}, "file_name=.*nowhere.json does not exist"),
        ({"file_name": "data.arrow"}, "ends in .arrow"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_to_do(said: dict[str, Any], sentence: str, tmp_path: Path):
    write_rows(tmp_path, "data.json", [{"instruction": "q", "output": "a"}])
    (tmp_path / "data.arrow").write_text("")
    write_info(tmp_path, **said)
    with pytest.raises(DataError, match=sentence):
        locate_source("mine", source_of(tmp_path), "")


def test_num_samples_is_the_sources_sample(tmp_path: Path):
    write_rows(tmp_path, "data.json", [{"instruction": "q", "output": "a"}])
    write_info(tmp_path, file_name="data.json", num_samples=5)
    assert locate_source("mine", source_of(tmp_path, sample=5), "").files


def test_another_entry_is_asked_for_by_what_is_there(tmp_path: Path):
    write_info(tmp_path, file_name="data.json")
    source = SourceConfig(kind=SourceKind.llama_factory, path=str(tmp_path), dataset="zhh")
    with pytest.raises(DataError, match=r"has no entry zhh; give dataset= one of it \(zh\)"):
        locate_source("mine", source, "")
    for broken in (SourceConfig(kind=SourceKind.llama_factory), SourceConfig(kind=SourceKind.llama_factory, path="a")):
        with pytest.raises(DataError, match=r"give data\.sources\.mine\.path=FOLDER/dataset_info\.json"):
            locate_source("mine", broken, "")


def test_a_folder_of_an_entry_is_read_without_the_file_that_describes_it(tmp_path: Path):
    write_info(tmp_path, file_name=".")
    write_rows(tmp_path, "data.json", [{"instruction": "q", "output": "a"}])
    location: Location = locate_source("mine", source_of(tmp_path), "")
    assert [file.path.name for file in location.files] == ["data.json"]


def test_tools_and_calls_are_those_of_the_same_row_as_sharegpt_has_it(tmp_path: Path):
    call = json.dumps({"name": "weather", "arguments": {"city": "北京"}})
    turns = [("human", "天气?"), ("function_call", call), ("observation", "晴"), ("gpt", "晴天。")]
    tools = json.dumps([{"name": "weather", "description": "", "parameters": {}}])
    row = {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": tools}
    columns = {"messages": "conversations", "tools": "tools"}
    write_info(tmp_path, file_name="data.jsonl", formatting="sharegpt", columns=columns)
    write_rows(tmp_path, "data.jsonl", [row])
    told = list(PARSERS[SourceKind.sharegpt](row, SourceConfig(kind=SourceKind.sharegpt, path="x"), Counter()))
    assert parse_all(tmp_path) == (told, Counter()) and told[0].tools


SHAREGPTS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    "said, row, reason",
    [({"columns": {"prompt": "问题", "response": "output"}}, {"instruction": "q", "output": "a"}, "missing field 问题"),
     ({"columns": {"prompt": "instruction", "response": "答"}}, {"instruction": "q"}, "missing field 答"),
     ({"columns": {"messages": "对话"}, "formatting": "sharegpt"}, {"conversations": SHAREGPTS}, "missing field 对话"),
     ({"tags": {"role_tag": "role"}, "formatting": "sharegpt"}, {"conversations": SHAREGPTS}, "missing field role")],
    ids=["prompt", "response", "messages", "role"],
)  # fmt: skip
def test_what_an_entry_names_and_a_row_lacks_is_told_by_its_name(said, row, reason, tmp_path: Path):
    write_info(tmp_path, file_name="data.json", **said)
    write_rows(tmp_path, "data.json", [row])
    with pytest.raises(RowError, match=reason):
        parse_all(tmp_path)


def test_a_key_that_the_format_has_not_is_refused(tmp_path: Path):
    write_info(tmp_path, file_name="data.json", colums={"prompt": "q"})
    write_rows(tmp_path, "data.json", [{"q": "q"}])
    with pytest.raises(DataError, match=r"entry zh of .*dataset_info\.json has colums, which is none of columns, "):
        parse_all(tmp_path)
