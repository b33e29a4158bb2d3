"""`cqlora push`: what a hub would get, what is refused, and what is sent, to a hub that is none."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

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
    for name, text in (("zh.f16.gguf", "weights"), ("Modelfile", "FROM ./zh.f16.gguf\n"), ("cqlora.json", "{}")):
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text(page_of_merge("zh", Path("models/base"), "", "", [PAGE]), encoding="utf-8")
    push(config(tmp_path))
    assert {"zh.f16.gguf", "Modelfile", "README.md"} <= set(hub.commits[0][2])
    assert "## Training\n\n- much" in hub.commits[0][2]["README.md"].decode()


def test_without_a_token_and_with_a_hub_that_refuses_one_sentence_is_said_without_the_token(adapter, hub, monkeypatch):
    monkeypatch.setattr(hub, "create_commit", lambda *_, **__: (_ for _ in ()).throw(OSError(f"no route, {TOKEN}")))
    with pytest.raises(ModelError, match=r"me/zh cannot be written at https://huggingface\.co \(no route, …\)"):
        push(config(adapter))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="no token for the hub; log in by `hf auth login`, or set HF_TOKEN"):
        push(config(adapter))


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
