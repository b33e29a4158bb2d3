"""A ModelScope dataset, by a server of this machine that answers as ModelScope's does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from cqlora.config.choices import SourceKind
from cqlora.config.schema import SourceConfig
from cqlora.data.sources import modelscope, read_rows
from cqlora.data.sources.hub import require_hub
from cqlora.data.sources.location import Location, locate_source
from cqlora.errors import DataError

ROWS = [{"instruction": f"问{n}", "output": f"答{n}"} for n in range(3)]


class Hub:
    """What lies in the repository org/zh, and what was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.cut: set[str] = set()
        self.longer = b""
        self.listing: bytes | None = None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    known = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(b"")

        def do_GET(self) -> None:
            address, query = urlsplit(self.path), {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
            known.asked.append(address.path)
            if address.path.endswith("/tree") and known.listing is not None:
                self.answer(known.listing)
            elif address.path == "/api/v1/datasets/org/zh/repo/tree":
                entries = [{"Path": "data", "Type": "tree"}]
                entries += [{"Path": path, "Type": "blob", "Size": len(body)} for path, body in known.files.items()]
                first = (int(query["PageNumber"]) - 1) * int(query["PageSize"])
                page = entries[first : first + int(query["PageSize"])]
                self.answer(json.dumps({"Code": 200, "Data": {"Files": page}}).encode())
            elif address.path == "/api/v1/datasets/org/zh/repo" and query["FilePath"] in known.files:
                body = known.files[query["FilePath"]]
                body += known.longer
                self.answer(body[: len(body) // 2] if query["FilePath"] in known.cut else body)
            else:
                self.send_error(404)

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "*")
    yield known
    server.shutdown()


def source(subset: str = "") -> SourceConfig:
    return SourceConfig(kind=SourceKind.alpaca, dataset="modelscope://org/zh", subset=subset)


def located(subset: str = "") -> Location:
    return locate_source("mine", source(subset), "")


def lines(rows: list[dict[str, str]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def test_files_are_read_as_files_here_are_with_the_splits_of_their_names(hub: Hub, tmp_path: Path):
    hub.files = {
        "README.md": b"# data", ".gitattributes": b"", "data/train-0.jsonl": lines(ROWS[:2]),
        "data/val.json": json.dumps(ROWS[2:]).encode(), "data/picture.png": b"x",
    }  # fmt: skip
    require_hub(located())
    found = list(read_rows(located(), source()))
    assert [row.split for row in found] == ["train", "train", "val"]
    assert [row.file for row in found] == ["modelscope://org/zh/data/train-0.jsonl"] * 2 + [
        "modelscope://org/zh/data/val.json"
    ]
    assert [json.loads(row.body) if isinstance(row.body, bytes) else row.body for row in found] == ROWS
    assert "/api/v1/datasets/org/zh/repo" in hub.asked


def test_every_page_of_a_long_listing_is_asked_for(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(modelscope, "PAGE", 4)
    hub.files = {f"{n}.jsonl": lines([row]) for n, row in enumerate(ROWS * 3)}
    assert len(list(read_rows(located(), source()))) == 9


def test_a_subset_is_a_folder_of_the_repository(hub: Hub):
    hub.files = {"a/x.jsonl": lines(ROWS[:1]), "b/x.jsonl": lines(ROWS)}
    assert len(list(read_rows(located("a"), source("a")))) == 1
    with pytest.raises(DataError, match=r"has no file in c/ that kind=alpaca reads; its files are a/x\.jsonl"):
        list(read_rows(located("c"), source("c")))


def test_what_breaks_off_is_no_end_and_an_unknown_dataset_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.files, hub.cut = {"x.jsonl": lines(ROWS)}, {"x.jsonl"}
    size = len(hub.files["x.jsonl"])
    with pytest.raises(DataError, match=rf"x\.jsonl: it ends after {size // 2} of {size} bytes.*MODELSCOPE_ENDPOINT"):
        list(read_rows(located(), source()))
    other = SourceConfig(kind=SourceKind.alpaca, dataset="modelscope://org/other")
    with pytest.raises(DataError, match=r"modelscope://org/other cannot be streamed \(HTTP Error 404"):
        list(read_rows(locate_source("mine", other, ""), other))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="cannot be streamed"):
        require_hub(located())


@pytest.mark.parametrize(
    "listing, why",
    [(b"[1, 2]", "no list of files"), (b"{", "Expecting property name"), (b'{"Data": 5}', "no list of files"),
     (b'{"Data": {"Files": [{"Size": 5}]}}', "no list of files"), (b'{"Data": {"Files": "x"}}', "no list of files"),
     (b" " * 5000, "has more than"),
     (json.dumps({"Data": [{"Path": "a.jsonl"}] * modelscope.PAGE}).encode(), "lists more")],
    ids=range(7),
)  # fmt: skip
def test_an_answer_that_is_no_hubs_or_has_no_end_is_one_sentence(listing, why, hub: Hub, monkeypatch):
    monkeypatch.setattr(modelscope, "_MOST_BYTES", 4500)
    monkeypatch.setattr(modelscope, "_MOST_FILES", 1000)
    hub.listing = listing
    with pytest.raises(DataError, match=f"cannot be streamed \\(.*{why}.*MODELSCOPE_ENDPOINT"):
        list(read_rows(located(), source()))


def test_a_file_longer_than_the_hub_lists_it_is_not_fetched_to_its_end(hub: Hub):
    hub.files["x.jsonl"] = b"{}"
    hub.longer = b" " * 100
    with pytest.raises(DataError, match=r"x\.jsonl: it goes on after its 2 bytes"):
        list(read_rows(located(), source()))
