"""Where a source is found, in which order, and what is said when it is not."""

import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest

from cqlora.config.choices import SourceKind
from cqlora.config.schema import SourceConfig
from cqlora.data.sources import hub, read_rows
from cqlora.data.sources.hub import read_dataset
from cqlora.data.sources.location import SAMPLE_DIR, Location, list_files, locate_source
from cqlora.errors import DataError


def source(**settings: str) -> SourceConfig:
    return SourceConfig(kind=SourceKind.wiki, **settings)


def test_path_comes_before_root_and_root_before_the_dataset(tmp_path: Path):
    (tmp_path / "corpus.jsonl").touch()
    (tmp_path / "elsewhere.jsonl").touch()
    elsewhere = str(tmp_path / "elsewhere.jsonl")
    by_path = locate_source("corpus", source(path=elsewhere, dataset="a/b"), str(tmp_path))
    by_name = locate_source("corpus", source(dataset="a/b"), str(tmp_path))
    by_dataset = locate_source("other", source(dataset="a/b", subset="zh"), str(tmp_path))
    assert [file.path.name for file in by_path.files] == ["elsewhere.jsonl"]
    assert [file.path.name for file in by_name.files] == ["corpus.jsonl"]
    assert by_dataset == Location(dataset="a/b", subset="zh")


def test_a_source_that_is_nowhere_names_the_three_places():
    with pytest.raises(DataError, match=r"data\.sources\.x\.path.*data\.root.*data\.sources\.x\.dataset"):
        locate_source("x", source(), "")


def test_a_missing_path_is_no_reason_to_take_another_source(tmp_path: Path):
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(DataError, match=r"data\.sources\.x\.path=nowhere does not exist"):
        locate_source("x", source(path="nowhere"), str(tmp_path))


def test_two_files_of_one_name_are_refused(tmp_path: Path):
    (tmp_path / "x.jsonl").touch()
    (tmp_path / "x.parquet").touch()
    with pytest.raises(DataError, match="found twice"):
        locate_source("x", source(), str(tmp_path))


def test_the_bundled_sample_is_found_without_a_root():
    assert {file.split for file in locate_source("sample_zh", source(), "").files} == {"train", "val", "test"}
    assert all(SAMPLE_DIR in file.path.parents for file in locate_source("sample_en", source(), "").files)


def test_files_declare_their_splits_by_name(tmp_path: Path):
    for name in (
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "validation.jsonl",
        "notes.txt",
    ):
        (tmp_path / name).touch()
    assert [(file.path.name, file.split) for file in list_files(tmp_path, "x", SourceKind.wiki)] == [
        ("train-00000-of-00002.parquet", "train"),
        ("train-00001-of-00002.parquet", "train"),
        ("validation.jsonl", "val"),
    ]


def test_a_folder_with_training_files_alone_is_split_by_hash(tmp_path: Path):
    (tmp_path / "train.jsonl").touch()
    assert [file.split for file in list_files(tmp_path, "x", SourceKind.wiki)] == [None]


def test_a_hugging_face_dataset_is_streamed(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = [{"title": f"t{n}", "text": f"text {n}"} for n in range(5)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    datasets.Dataset.from_list(rows[:2]).to_parquet(str(tmp_path / "test.parquet"))
    read = list(read_dataset(Location(dataset=str(tmp_path))))
    assert [row.body for row in read if row.split == "train"] == rows
    assert [row.body for row in read if row.split == "test"] == rows[:2]


def test_a_dataset_without_a_network_fails_at_once(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets")

    def no_network(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for variable in (
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
    ):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(DataError, match=r"wikimedia/wikipedia cannot be streamed.*data\.root=FOLDER"):
        list(read_dataset(Location(dataset="wikimedia/wikipedia", subset="20231101.zh")))


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").touch()
    for location in (locate_source("x", source(path="~/x.jsonl"), ""), locate_source("x", source(), "~")):
        assert [file.path for file in location.files] == [tmp_path / "x.jsonl"]


def test_a_table_of_a_kind_whose_rows_are_nested_is_refused_with_how_to_convert_it(tmp_path: Path):
    (tmp_path / "x.csv").write_text("messages\nq\n")
    rows = SourceConfig(kind=SourceKind.messages, path=str(tmp_path / "x.csv"))
    refusal = r"x\.csv ends in \.csv, and kind=messages reads .*read_csv\('x\.csv'\)"
    with pytest.raises(DataError, match=refusal) as error:
        locate_source("x", rows, "")
    assert "\n" not in str(error.value)


def test_a_workbook_is_refused_with_how_to_convert_it(tmp_path: Path):
    (tmp_path / "x.xlsx").touch()
    with pytest.raises(DataError, match=r"kind=alpaca reads .*\.csv.*read_excel\('x\.xlsx'\)"):
        locate_source("x", SourceConfig(kind=SourceKind.alpaca, path=str(tmp_path / "x.xlsx")), "")


def test_a_folder_of_notes_and_tables_is_read_whole(tmp_path: Path):
    for name in ("a.txt", "b.md", "c.csv.gz", "d.tsv", "e.pdf", "f.xml"):
        (tmp_path / name).touch()
    for kind in (SourceKind.text, SourceKind.auto):
        assert [file.path.name[0] for file in list_files(tmp_path, "x", kind)] == ["a", "b", "c", "d"]


def test_files_that_hold_no_rows_are_refused_or_passed_over(tmp_path: Path):
    for name in ("README.md", "rows.jsonl.gz"):
        (tmp_path / name).touch()
    assert [file.path.name for file in list_files(tmp_path, "x", SourceKind.belle)] == ["rows.jsonl.gz"]
    assert len(list_files(tmp_path, "x", SourceKind.text)) == 2
    with pytest.raises(DataError, match=r"README\.md ends in \.md, and kind=belle reads \.jsonl, \.json, \.parquet"):
        list_files(tmp_path / "README.md", "x", SourceKind.belle)


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


THREE_PLACES = r"^source wiki is nowhere to be found: data\.sources\.wiki\.path .* data\.root, and .*dataset=a/b .*{}"


def test_a_hub_that_never_answers_is_waited_for_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch, no_proxies):
    released = threading.Event()
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.05)

    def answer_never(*_: object, **__: object) -> None:
        released.wait()
        raise OSError

    monkeypatch.setattr(hub, "urlopen", answer_never)
    with pytest.raises(DataError, match=THREE_PLACES.format("no answer in 0.05 s")):
        hub.require_hub(Location(dataset="a/b", name="wiki"))
    released.set()


@pytest.mark.parametrize(("status", "answers"), [(200, True), (401, True), (404, True), (503, False)])
def test_a_hub_that_answers_is_asked_for_the_dataset(
    monkeypatch: pytest.MonkeyPatch, no_proxies, status: int, answers: bool
):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        if answers:
            hub.require_hub(Location(dataset="a/b", name="wiki"))
        else:
            with pytest.raises(DataError, match=THREE_PLACES.format("503")):
                hub.require_hub(Location(dataset="a/b", name="wiki"))
        server.shutdown()


@pytest.mark.parametrize(
    "error", [AttributeError("'list' object has no attribute 'get'"), LookupError(), BufferError("x")]
)
def test_whatever_the_hubs_client_raises_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=THREE_PLACES.format(re.escape(str(error) or type(error).__name__))):
        list(hub.read_dataset(Location(dataset="a/b", name="wiki")))


def test_an_address_that_nobody_listens_at_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch, no_proxies):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=THREE_PLACES.format("refused")):
        hub.require_hub(Location(dataset="a/b", name="wiki"))


def test_a_files_format_is_its_last_suffix_in_any_letters(tmp_path: Path):
    table, rows = "instruction,output\nq,a\n", '{"instruction": "q", "output": "a"}\n'
    source = SourceConfig(kind=SourceKind.alpaca)
    for name, text in (("A.CSV", table), ("B.JSONL", rows), ("chats.jsonl.csv", table)):
        (tmp_path / name).write_text(text)
        found = list(read_rows(Location(files=list_files(tmp_path / name, "x", source.kind)), source))
        bodies = [json.loads(row.body) if isinstance(row.body, bytes) else row.body for row in found]
        assert bodies == [{"instruction": "q", "output": "a"}], name
    assert len(list_files(tmp_path, "x", source.kind)) == 3


def test_auto_passes_over_what_only_describes_a_datasets_files(tmp_path: Path):
    for name in ("README.md", "LICENSE.txt", "dataset_info.json", "rows.jsonl", "notes.md"):
        (tmp_path / name).write_text("{}\n")
    assert [file.path.name for file in list_files(tmp_path, "x", SourceKind.auto)] == ["notes.md", "rows.jsonl"]
    assert len(list_files(tmp_path, "x", SourceKind.text)) == 5
