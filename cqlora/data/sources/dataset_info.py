"""An entry of LLaMA-Factory's dataset_info.json: which files or dataset, and what its columns and tags are called.

Format as https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md describes it.
"""

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cqlora.config.schema import SourceConfig
from cqlora.errors import DataError, ModelError
from cqlora.system.documents import read_object

INFO = "dataset_info.json"
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
SHAREGPT = {"messages": "conversations"}
ROLES = {"user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation",
          "function_tag": "function_call", "system_tag": "system"}  # fmt: skip
_TAGS = {"role_tag": "from", "content_tag": "value", **ROLES}
_COMMON = ("system", "tools", "chosen", "rejected", "kto_tag")
MEDIA = ("images", "videos", "audios")
_KEYS = {
    "hf_hub_url", "ms_hub_url", "om_hub_url", "file_name", "file_sha1", "formatting", "ranking", "subset", "split",
    "num_samples", "columns", "tags",
}  # fmt: skip
_ELSEWHERE = {
    "script_url": "is made by a script, which is not run here",
    "cloud_file_name": "lies in a cloud",
    "folder": "is a folder of a hub's repository",
    "revision": "is a revision of a hub's repository",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """What an entry says of its rows."""

    formatting: str
    ranking: bool
    columns: dict[str, str] = field(default_factory=dict)
    """The column of each part that rows may have."""
    tags: dict[str, str] = field(default_factory=dict)
    """What messages call role and content, and what each role."""

    def required(self) -> list[str]:
        """Parts without which a row is none."""
        replies = ("chosen", "rejected") if self.ranking else ("response",)
        return [part for part in ("prompt", "messages", *replies) if part in self.columns]


def read_entry(file: Path, name: str, source: SourceConfig) -> tuple[Entry, dict[str, Any]]:
    """An entry by its name, and all that it says.

    Raises:
        DataError: there is none, it is damaged, or it asks for what is not done here; the sentence says what to do.
    """
    try:
        info = read_object(file)
    except ModelError as error:
        raise DataError(str(error)) from None
    said = info.get(name)
    if not isinstance(said, dict):
        near = ", ".join(get_close_matches(name, info, 3, 0.5) or sorted(info)[:8])
        raise DataError(f"{file} has no entry {name}; give dataset= one of it ({near}).")
    refuse_elsewhere(said, file, name, source)
    return describe(said, f"entry {name} of {file}"), said


def describe(said: dict[str, Any], what: str) -> Entry:
    """What an entry says of its rows; where it names columns, those that it does not name are none.

    Raises:
        DataError: what it says is of another shape.
    """
    formatting, ranking = said.get("formatting", "alpaca"), said.get("ranking", False)
    columns, tags = said.get("columns"), said.get("tags") or {}
    if formatting not in ("alpaca", "sharegpt", "openai") or not isinstance(ranking, bool):
        raise DataError(
            f"{what} has formatting={formatting}, ranking={ranking}; use alpaca or sharegpt, true or false."
        )
    for key, names in (("columns", {} if columns is None else columns), ("tags", tags)):
        if not isinstance(names, dict) or not all(isinstance(name, str | None) for name in names.values()):
            raise DataError(f"{what} has {key} that are no names; write an object of them.")
    own = dict(ALPACA if formatting == "alpaca" else SHAREGPT)
    if columns is not None:
        own = {part: columns[part] for part in (*own, "history", *_COMMON, *MEDIA) if columns.get(part)}
    return Entry(formatting, ranking, own, _TAGS | {tag: name for tag, name in tags.items() if name})


def refuse_elsewhere(said: dict[str, Any], file: Path, name: str, source: SourceConfig) -> None:
    """Raise DataError for an entry whose rows cannot be had, or of which part would have no effect."""
    if unknown := sorted(said.keys() - _KEYS - _ELSEWHERE.keys()):
        raise DataError(
            f"entry {name} of {file} has {unknown[0]}, which is none of {', '.join(sorted(_KEYS))}; take it out."
        )
    for key, what in _ELSEWHERE.items():
        if said.get(key):
            raise DataError(
                f"entry {name} of {file} {what} ({key}={said[key]}); fetch its files, and name them by file_name."
            )
    if said.get("split", "train") != "train":
        raise DataError(f"entry {name} of {file} takes split={said['split']}; name files of that split by file_name.")
    if said.get("num_samples") and source.sample is None:
        raise DataError(
            f"entry {name} of {file} has num_samples={said['num_samples']}; set the source's sample=N, which is chosen "
            "by the run's seed."
        )
    if not any(said.get(key) for key in ("file_name", "hf_hub_url", "ms_hub_url")):
        raise DataError(f"entry {name} of {file} names no file_name, hf_hub_url or ms_hub_url; give it one.")
