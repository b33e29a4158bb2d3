"""Where a source is found, in which order, and what is said when it is not."""

import socket
from pathlib import Path

import pytest

from cqlora.choices import SourceKind
from cqlora.config import SourceConfig
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
