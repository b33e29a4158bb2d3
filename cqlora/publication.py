"""What of a folder goes to a hub: known files, no secret, no path of this machine, a card that names a licence."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from cqlora.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, README, read_base, read_card, seal, verify_adapter
from cqlora.config.secrets import holds_secret
from cqlora.errors import ConfigError, ModelError
from cqlora.model_card import edit_front, is_hub_name, read_front
from cqlora.system.companions import COMPANIONS
from cqlora.system.documents import escape_controls, first_words, list_files, read_object, read_text
from cqlora.system.tensor_files import INDEX

MODELFILE = "Modelfile"
"""For Ollama, beside a GGUF file."""
PATIENCE_SECONDS = 120.0
"""How long the hub may say nothing."""
_BEGINNINGS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_NAMES = {README, CARD, ADAPTER_CONFIG, "config.json", "tokenizer.json", INDEX, MODELFILE, *COMPANIONS}
_WEIGHTS = (".safetensors", ".gguf", ".model")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
"""Any of whose thousands of tokens may look like a key."""
_KINDS = "an adapter (adapter_config.json), a merged model (config.json) or a GGUF file"


@dataclass(frozen=True, slots=True)
class Publication:
    """The files of a folder that a hub gets."""

    folder: Path
    files: list[str]
    """Names of those that go as they are."""
    rewritten: dict[str, bytes] = field(default_factory=dict)
    """Content of those that would name this machine's folders, and of the model card."""
    left_out: list[str] = field(default_factory=list)

    def size(self, name: str) -> int:
        """Bytes of a file as it is uploaded."""
        return len(self.rewritten[name]) if name in self.rewritten else (self.folder / name).stat().st_size

    @property
    def names(self) -> list[str]:
        """All that is uploaded."""
        return sorted({*self.files, *self.rewritten})


def gather(folder: Path, licence: str, base_model: str) -> Publication:
    """Choose, check and rewrite a folder's files.

    Raises:
        ModelError: no adapter or model, one that is damaged, or a file that leads out of the folder or holds a secret.
        ConfigError: a model card without a licence.
    """
    require_publishable(folder)
    known = [name for each in list_files(folder) if is_known(name := str(each.relative_to(folder)))]
    rewritten = {README: write_page(folder, licence, base_model), **rewrite_paths(folder, base_model)}
    found = Publication(
        folder, [name for name in known if name not in rewritten], rewritten,
        [each.name for each in sorted(folder.iterdir()) if not any(Path(name).parts[0] == each.name for name in known)],
    )  # fmt: skip
    for name in found.names:
        refuse_unfit(found, name)
    return found


def is_known(name: str) -> bool:
    """Whether a file belongs to a model or an adapter, and is not another that lies there by chance."""
    return name in _NAMES or name.startswith(_BEGINNINGS) or (name.endswith(_WEIGHTS) and not name.startswith("."))


def require_publishable(folder: Path) -> None:
    """Raise ModelError for a folder that holds neither an adapter nor a model, or damaged ones."""
    if not folder.is_dir():
        raise ModelError(f"folder={folder} does not exist; give the folder of an adapter or a merged model.")
    if (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_WEIGHTS).is_file():
        verify_adapter(folder)
    elif (folder / "config.json").is_file():
        read_base(folder)
    elif not any(folder.glob("*.gguf")):
        raise ModelError(f"folder={folder} holds neither {_KINDS}; give such a folder.")


def refuse_unfit(found: Publication, name: str) -> None:
    """Raise ModelError for a file that is a link to elsewhere, or whose text holds a secret."""
    file = found.folder / name
    if name in found.files and not file.resolve().is_relative_to(found.folder.resolve()):
        raise ModelError(f"{file} is a link out of its folder; put the file itself there, or remove the link.")
    if name.endswith(_WEIGHTS) or name in _VOCABULARIES:
        return
    text = found.rewritten[name].decode() if name in found.rewritten else read_text(file)
    if holds_secret(text):
        raise ModelError(f"{file} holds what looks like a secret, which nobody could take back; remove it.")


def write_page(folder: Path, licence: str, base_model: str) -> bytes:
    """README.md with the licence and the base that were given, where it names none.

    Raises:
        ConfigError: it names no licence and none is given, or another one.
        ModelError: there is none, or its front matter is no YAML.
    """
    file = folder / README
    if not file.is_file():
        raise ModelError(f"{folder} has no {README}, which hubs show as its model card; write one.")
    page = read_text(file)
    front = read_front(page, file)
    if not is_hub_name(str(front.get("base_model"))):
        front.pop("base_model", None)
    for key, value in (("license", licence), ("base_model", base_model)):
        if value and front.get(key) not in (None, value):
            raise ConfigError(f"{key}={value}, and {file} says {key}: {front[key]}; change one of them.")
    if not (licence or front.get("license")):
        raise ConfigError(
            f"{file} names no licence; give license=NAME (apache-2.0, llama3.1, other, …) as those of the base and of "
            "the data allow."
        )
    given = {key: value for key, value in (("license", licence), ("base_model", base_model)) if value}
    return edit_front(page, front | given).encode()


def rewrite_paths(folder: Path, base_model: str) -> dict[str, bytes]:
    """cqlora.json and adapter_config.json with names in place of this machine's folders, sealed anew."""
    rewritten: dict[str, bytes] = {}
    card = {key: name_folders(key, value) for key, value in read_card(folder).items()}
    if (folder / ADAPTER_CONFIG).is_file():
        config = read_object(folder / ADAPTER_CONFIG)
        base = str(config.get("base_model_name_or_path") or "")
        config["base_model_name_or_path"] = base_model or PurePath(base).name
        rewritten[ADAPTER_CONFIG] = to_bytes(config)
        if "adapter_config_sha256" in card:
            card["adapter_config_sha256"] = hashlib.sha256(rewritten[ADAPTER_CONFIG]).hexdigest()
    return rewritten | ({CARD: to_bytes(seal(card))} if card else {})


def name_folders(key: str, value: Any) -> Any:
    """A card's value with the last part of each path that it names."""
    if isinstance(value, str):
        return PurePath(value).name if key in ("base", "path", "merged_from", "added_from") else value
    if isinstance(value, list) and key in ("merged_from", "added_from"):
        return [name_folders(key, each) for each in value]
    if isinstance(value, dict) and key == "init_adapter":
        return {inner: name_folders(inner, each) for inner, each in value.items()}
    return value


def to_bytes(document: object) -> bytes:
    """JSON as people read it."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def tell(found: Publication) -> str:
    """The files with their sizes, what is left out, and the model card."""
    return escape_controls("\n".join(_lines(found)))


def _lines(found: Publication) -> Iterator[str]:
    for name in found.names:
        yield f"{found.size(name):>16,} bytes  {name}"
    yield f"{sum(map(found.size, found.names)):>16,} bytes in {len(found.names)} files of {found.folder}"
    if found.left_out:
        yield f"left out: {', '.join(found.left_out)}"
    yield f"model card:\n{found.rewritten[README].decode()}"


def upload(found: Publication, repo: str, endpoint: str, private: bool, message: str) -> str:
    """Upload all files in one commit, which a hub shows whole or not at all; return the repository's address.

    The token is HF_TOKEN's or that of `hf auth login`.

    Raises:
        ConfigError: there is no token.
        ModelError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_session, get_token

    token = get_token()
    if not token:
        raise ConfigError("there is no token for the hub; log in by `hf auth login`, or set HF_TOKEN.")
    # The client waits for ever of itself.
    get_session().timeout = PATIENCE_SECONDS
    api = HfApi(endpoint=endpoint, token=token)
    operations = [
        CommitOperationAdd(name, found.rewritten.get(name) or str(found.folder / name)) for name in found.names
    ]
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        api.create_commit(repo, operations, commit_message=message)
    except Exception as error:  # noqa: BLE001 - the client's, its own client's, and what answers of no hub lead to
        told = (first_words(error) or type(error).__name__).replace(token, "…")
        raise ModelError(
            f"{repo} cannot be written at {endpoint} ({told}); the commit is there whole or not at all, so try again."
        ) from None
    return str(address)
