"""The files beside a base's weights that decide how it is asked and what ends its replies, and whether they changed.

No weight depends on them, so a user may change them on purpose: what refuses a changed one says how to accept it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cqlora.errors import ConfigError, ModelError
from cqlora.system.documents import NAMED_TEMPLATES, read_object
from cqlora.system.fingerprints import hash_whole

COMPANIONS = (
    "added_tokens.json",
    f"{NAMED_TEMPLATES}/tool_use.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
ACCEPT = "type {key}=[{names}] to take {them} now"
"""What to do where an option accepts what changed."""
ACCEPT_IN_RUN = ACCEPT.replace("{key}", "model.accept_changed")
UNSEAL = "remove companions and card_sha256 from {card} if the change is meant"
"""What to do where none does: the same for every command that reads the base."""


def hash_companions(folder: Path) -> dict[str, str | None]:
    """sha256 of each companion of a base; None of one that is not there.

    Raises:
        ModelError: one that is to be JSON is not.
    """
    return {name: hash_companion(folder / name) for name in COMPANIONS}


def hash_companion(file: Path) -> str | None:
    """sha256 of one of them, if it is there."""
    if not file.is_file():
        return None
    if file.suffix == ".json":
        read_object(file)
    return hash_whole(file)


def refuse_changed(
    folder: Path, known: Mapping[str, Any], since: str, remedy: str, accepted: Sequence[str] = ()
) -> None:
    """Compare a base's companions with what is known of them, but for those that are accepted as they are.

    Raises:
        ModelError: one is not the file that it was, or is damaged; the sentence says `since` when and the `remedy`.
    """
    now = hash_companions(folder)
    changed = [name for name, digest in sorted(known.items()) if now.get(name) != digest and name not in accepted]
    if not changed:
        return
    several = len(changed) > 1
    them, are, as_are = (
        ("them", "are not as they were", "them as they are") if several else ("it", "is not as it was", "it as it is")
    )
    remedy = remedy.replace("{names}", ",".join(changed)).replace("{them}", as_are)
    raise ModelError(f"{', '.join(str(folder / name) for name in changed)} {are} {since}; restore {them}, or {remedy}.")


def check_accepted(key: str, names: Sequence[str]) -> None:
    """Raise ConfigError for a name under `key` that is none of a companion."""
    unknown = [name for name in names if name not in COMPANIONS]
    if unknown:
        raise ConfigError(
            f"{key} names {unknown[0]}, which is no file that goes along; use some of {', '.join(COMPANIONS)}."
        )
