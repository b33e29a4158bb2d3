"""`cqlora push`: what a hub would get, what is refused, and what is sent, to a hub that is none."""

import json
import socket
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from cqlora import publication
from cqlora.base import read_card, verify_adapter
from cqlora.errors import ConfigError, ModelError
from cqlora.model_card import page_of_merge
from cqlora.push import PushConfig, push
from tests.cards import change_card
from tests.conftest import run_verb

TOKEN = "hf_" + "aBcDeFgHiJ" * 3
PAGE = "---\nlibrary_name: peft\ntags:\n- cqlora\n---\n\n# My adapter\n\n## Training\n\n- much\n"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder in an adapter's form, on a base of this machine, with files beside that are nobody's business."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 100)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/home/wang/models/my_base", "r": 8})
    )
    (folder / "README.md").write_text(PAGE, encoding="utf-8")
    change_card(
        folder, base="/home/wang/models/my_base", base_sha256="v2-" + "0" * 64,
        init_adapter={"path": "/home/wang/first", "adapter_sha256": "1" * 64},
    )  # fmt: skip
    (folder / ".env").write_text("nothing")
    (folder / "notes.txt").write_text("nothing")
    (folder / "checkpoints").mkdir()
    return folder


class FakeHub:
    """Takes what HfApi would send."""

    def __init__(self) -> None:
        self.made: dict = {}
        self.commits: list = []
        self.endpoint = self.token = None

    def __call__(self, endpoint: str, token: str) -> "FakeHub":
        self.endpoint, self.token = endpoint, token
        return self

    def create_repo(self, repo: str, private: bool | None, exist_ok: bool) -> str:
        self.made = {"repo": repo, "private": private, "exist_ok": exist_ok}
        return f"{self.endpoint}/{repo}"

    def create_commit(self, repo: str, operations: list, commit_message: str) -> None:
        sent = {}
        for each in operations:
            with each.as_file() as stream:
                sent[each.path_in_repo] = stream.read()
        self.commits.append((repo, commit_message, sent))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    return fake


def config(folder: Path, **options) -> PushConfig:
    return PushConfig(**{"folder": str(folder), "repo": "me/zh", "license": "apache-2.0"} | options)


def test_a_dry_run_tells_files_sizes_and_card_and_sends_nothing(adapter, hub, capsys):
    push(config(adapter, dry_run=True, base_model="org/base"))
    said = capsys.readouterr().out
    assert "             700 bytes  adapter_model.safetensors" in said
    assert " bytes in 4 files of " in said and "left out: .env, checkpoints, notes.txt" in said
    assert "license: apache-2.0\nbase_model: org/base\n---\n\n# My adapter" in said
    assert "nothing was sent to https://huggingface.co/me/zh" in said
    assert not hub.commits and not hub.made


def test_one_commit_holds_the_folder_without_paths_of_this_machine_and_verifies(adapter, hub, tmp_path, capsys):
    push(config(adapter, base_model="org/base", private=True))
    assert (hub.endpoint, hub.token) == ("https://huggingface.co", TOKEN)
    assert hub.made == {"repo": "me/zh", "private": True, "exist_ok": True}
    ((repo, _, sent),) = hub.commits
    assert repo == "me/zh"
    assert set(sent) == {"adapter_config.json", "adapter_model.safetensors", "README.md", "cqlora.json"}
    assert not any(b"/home" in content for content in sent.values())
    copy = tmp_path / "fetched"
    copy.mkdir()
    for name, content in sent.items():
        (copy / name).write_bytes(content)
    verify_adapter(copy)
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    card = read_card(copy)
    assert (card["base"], card["init_adapter"]["path"]) == ("my_base", "first")
    assert ModelCard(sent["README.md"].decode()).data.license == "apache-2.0"
    out = capsys.readouterr().out
    assert "https://huggingface.co/me/zh has them." in out and TOKEN not in out


def test_the_folder_itself_stays_as_it_is(adapter, hub):
    before = {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()}
    push(config(adapter, base_model="org/base"))
    assert before == {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()}


def test_another_licence_than_the_card_names_is_refused_and_none_too(adapter, hub):
    with pytest.raises(ConfigError, match=r"README\.md names no licence; give license=NAME"):
        push(config(adapter, license=""))
    (adapter / "README.md").write_text(PAGE.replace("tags:", "license: mit\ntags:"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"license=apache-2\.0, and .* says license: mit"):
        push(config(adapter))
    push(config(adapter, license=""))
    assert len(hub.commits) == 1


def put_secret_in_card(folder: Path) -> None:
    change_card(folder, system_prompt=f"key {TOKEN}")


def put_secret_in_page(folder: Path) -> None:
    (folder / "README.md").write_text(f"{PAGE}\n{TOKEN}\n", encoding="utf-8")


def damage(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"other")


def link_out(folder: Path) -> None:
    (folder.parent / "elsewhere").write_text("private")
    (folder / "LICENSE").symlink_to(folder.parent / "elsewhere")


def take_page_away(folder: Path) -> None:
    (folder / "README.md").unlink()


def break_page(folder: Path) -> None:
    (folder / "README.md").write_text("---\n: [\n---\n# x\n")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put_secret_in_card, r"cqlora\.json holds what looks like a secret"),
        (put_secret_in_page, r"README\.md holds what looks like a secret"),
        (damage, "is not the file that its cqlora.json was written for"),
        (link_out, "LICENSE is a link out of its folder"),
        (take_page_away, r"has no README\.md"),
        (break_page, "begins with what is no YAML"),
    ],
)
def test_what_should_not_be_published_is_refused_before_anything_is_asked(change, sentence, adapter, hub):
    change(adapter)
    with pytest.raises(ModelError, match=sentence):
        push(config(adapter))
    assert not hub.made


def test_a_folder_that_is_no_model_is_refused(tmp_path, hub):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    with pytest.raises(ModelError, match="holds neither an adapter"):
        push(config(tmp_path / "run"))
    with pytest.raises(ModelError, match="does not exist"):
        push(config(tmp_path / "nowhere"))


def test_a_gguf_folder_goes_with_its_modelfile(tmp_path, hub):
    tool_use = "additional_chat_templates/tool_use.jinja"
    files = {
        "zh.f16.gguf": "weights",
        "Modelfile": "FROM ./zh.f16.gguf\n",
        "cqlora.json": "{}",
        tool_use: "{{ tools }}",
    }
    (tmp_path / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text(page_of_merge("zh", Path("models/base"), "", "", [PAGE]), encoding="utf-8")
    push(config(tmp_path))
    assert {"zh.f16.gguf", "Modelfile", "README.md", tool_use} <= set(hub.commits[0][2])
    assert "## Training\n\n- much" in hub.commits[0][2]["README.md"].decode()


def test_without_a_token_and_with_a_hub_that_refuses_one_sentence_is_said_without_the_token(adapter, hub, monkeypatch):
    monkeypatch.setattr(hub, "create_commit", lambda *_, **__: (_ for _ in ()).throw(OSError(f"no route, {TOKEN}")))
    with pytest.raises(ModelError, match=r"me/zh cannot be written at https://huggingface\.co \(no route, …\)"):
        push(config(adapter))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="no token for the hub; log in by `hf auth login`, or set HF_TOKEN"):
        push(config(adapter))


@pytest.fixture
def online(monkeypatch):
    """The hub's client goes to the network, for what it is asked alone, and has a token."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield
    huggingface_hub.close_session()


@pytest.fixture
def lying_hub(online):
    """A server that says what it is told to, or nothing; the heads of what it was asked."""
    server = HTTPServer(("127.0.0.1", 0), LyingHub)
    server.asked, server.answer = [], None
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


class LyingHub(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.asked.append(dict(self.headers))
        if self.server.answer is None:
            time.sleep(1)
            return
        status, headers, body = self.server.answer
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_):
        pass


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "answer", [None, (500, {}, b"boom"), (200, JSON, b"[1, 2]"), (200, JSON, b"{"),
               (403, JSON, b'{"error": "\\u001b[2J"}')],
    ids=["silence", "an error", "another answer", "half an answer", "control bytes"],
)  # fmt: skip
def test_a_hub_that_answers_otherwise_is_one_sentence(answer, adapter, lying_hub, monkeypatch):
    monkeypatch.setattr(publication, "PATIENCE_SECONDS", 0.2 if answer is None else 60)
    lying_hub.answer = answer
    endpoint = f"http://127.0.0.1:{lying_hub.server_port}"
    with pytest.raises(ModelError, match=f"^me/zh cannot be written at {endpoint} ") as refused:
        push(config(adapter, endpoint=endpoint))
    assert str(refused.value).isprintable() and TOKEN not in str(refused.value) and lying_hub.asked


def test_a_hub_that_is_not_there_is_one_sentence(adapter, online):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ModelError, match="Connection refused"):
            push(config(adapter, endpoint=endpoint))


def test_the_token_does_not_follow_to_another_host(adapter, lying_hub):
    lying_hub.answer = (307, {"Location": f"http://localhost:{lying_hub.server_port}/elsewhere"}, b"")
    with pytest.raises(ModelError, match="cannot be written"):
        push(config(adapter, endpoint=f"http://127.0.0.1:{lying_hub.server_port}"))
    first, *others = lying_hub.asked
    assert TOKEN in str(first) and others and TOKEN not in str(others)


def test_what_a_card_says_does_not_move_the_cursor(adapter, hub, capsys):
    (adapter / "README.md").write_text(PAGE + "\x1b[2J\x07", encoding="utf-8")
    push(config(adapter, dry_run=True))
    told = capsys.readouterr().out
    assert "\\x1b[2J\\x07" in told and "\x1b" not in told


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"repo": "zh"}, "repo=zh is no name on a hub"),
        ({"repo": "https://huggingface.co/me/zh"}, "is no name on a hub"),
        ({"base_model": "/home/me/base"}, "base_model=/home/me/base is no name on a hub"),
        ({"endpoint": "http://mirror.example"}, "would be sent your token unencrypted"),
        ({"dry_run": True, "private": True}, "private=True has no effect"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config(Path("adapter"), **options)


def test_the_mirror_that_is_read_from_gets_no_token(adapter, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    push(config(adapter))
    assert hub.endpoint == "https://huggingface.co"


def test_the_verb_tells_what_it_would_send(adapter):
    said = run_verb(adapter.parent, "push", "folder=adapter", "repo=me/zh", "license=mit", "dry_run=true").stdout
    assert "adapter_model.safetensors" in said and "license: mit" in said
