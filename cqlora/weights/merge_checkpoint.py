"""A run's checkpoint read as an adapter folder is: what trained, under PEFT's names, without another copy of it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from cqlora.base import ADAPTER_CONFIG, read_card
from cqlora.errors import ModelError
from cqlora.system.documents import read_object, take
from cqlora.system.fingerprints import hash_whole
from cqlora.system.shards import ShardReader

TRAINED, MANIFEST = "trainable-rank0.safetensors", "manifest.json"
"""As `train/state` and `train/checkpoint` write them."""
_INSIDE = re.compile(r"(?:^model\.|\.default(?=\.|$)|\.modules_to_save(?=\.default))")
"""What parameters of a model in training have in their names that an adapter's file leaves out."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run and no adapter."""
    return (folder / MANIFEST).is_file()


def adapter_of_run(checkpoint: Path) -> Path:
    """The adapter folder of the run that a checkpoint is of, which says what kind of adapter it is.

    Raises:
        ModelError: the run has not finished, or the folder was moved out of it.
    """
    folder = checkpoint.resolve().parent.parent / "adapter"
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{checkpoint} is a checkpoint and {folder} is not there to say of what; let its run finish, or put it "
            "back into its run's checkpoints/."
        )
    return folder


def open_checkpoint(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any], ShardReader]:
    """adapter_config.json, cqlora.json and the weights of the adapter that a checkpoint holds.

    Raises:
        ModelError: a checkpoint that is damaged, of several workers that each hold a share, or of PiSSA.
    """
    folder = adapter_of_run(checkpoint)
    card = read_card(folder)
    if card.get("trained_on", {}).get("method") == "pissa":
        raise ModelError(
            f"{checkpoint} is of PiSSA, whose matrices are beside a part of the base that is kept nowhere; merge "
            f"adapter={folder}."
        )
    manifest = read_object(checkpoint / MANIFEST)
    if len([name for name in manifest if name.startswith("trainable-")]) > 1:
        raise ModelError(f"{checkpoint} is in shares of several workers (fsdp); merge adapter={folder}.")
    if take(manifest, TRAINED, checkpoint / MANIFEST, str) != hash_whole(checkpoint / TRAINED):
        raise ModelError(f"{checkpoint / TRAINED} is not as it was written; take another checkpoint.")
    reader = ShardReader(checkpoint, checkpoint / TRAINED)
    reader.stored = {name_in_peft(name): tensor for name, tensor in reader.stored.items()}
    reader.specs = {name_in_peft(name): replace(spec, name=name_in_peft(name)) for name, spec in reader.specs.items()}
    return read_object(folder / ADAPTER_CONFIG), card, reader


def name_in_peft(parameter: str) -> str:
    """A trained parameter's name as an adapter's file has it."""
    return _INSIDE.sub("", parameter)


def last_checkpoints(run: Path, count: int) -> list[Path]:
    """The newest `count` checkpoints of a run, the oldest of them first.

    Raises:
        ModelError: the folder is no run's, or has fewer.
    """
    found = sorted(each for each in (run / "checkpoints").glob("step-*") if is_checkpoint(each))
    if len(found) < count:
        raise ModelError(
            f"run={run} has {len(found)} checkpoints and last={count} asks for more; use last={max(1, len(found))}, or "
            f"train with stage.keep_last={count}."
            if found
            else f"run={run} has no checkpoints/step-…; give the folder of a run."
        )
    return found[-count:]
