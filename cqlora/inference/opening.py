"""What the engine is given: the folders of an adapter and its base, or of a merged model, checked and read."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cqlora.base import CARD, Base, check_companions, fingerprint_adapter, fingerprint_weights, read_base, read_card
from cqlora.config.choices import AdapterMethod, MergeOnto, Precision, Quantization
from cqlora.errors import ConfigError, DiskError
from cqlora.inference.architecture import read_architecture
from cqlora.inference.decoder import Decoder, Weights
from cqlora.inference.form import Form, choose_form
from cqlora.inference.nf4_parts import holds_nf4
from cqlora.inference.snapshot import map_snapshot, snapshot_file, write_snapshot
from cqlora.inference.weights import Model, build_weights, pack_weights
from cqlora.positions import scale_as_trained
from cqlora.system.companions import UNSEAL
from cqlora.system.sealed import hash_file
from cqlora.system.shards import ShardReader
from cqlora.weights.merge import is_tied, plan_merge
from cqlora.weights.merge_adapter import open_adapter
from cqlora.weights.merge_lineage import read_training
from cqlora.weights.merge_plan import MergedSource, MergePlan
from cqlora.weights.nf4 import Nf4Format

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """Which folders, and how to hold them."""

    model_dir: Path
    base_dir: Path | None
    """The base of an adapter; None for a merged model."""
    quantization: str
    """`auto`: an adapter's base as it was trained on, a merged model as it is."""
    dtype: str
    cache: bool
    device: torch.device
    held_as: Path | None = None
    """An adapter whose card says how NF4 holds a model that is opened without it."""

    @property
    def folder(self) -> Path:
        """The folder that holds the tokenizer and the configuration."""
        return self.base_dir or self.model_dir


def open_decoder(request: Request) -> tuple[Decoder, Form]:
    """The decoder of what was asked for, from a snapshot where there is one.

    Raises:
        ModelError: a folder is missing or damaged, or the adapter is of another base or tokenizer.
    """
    base = read_base(request.folder)
    for folder in {request.folder, request.model_dir}:
        check_companions(base.path, folder, UNSEAL)
    architecture = read_architecture(read_trained_config(request, base), base.path)
    is_nf4 = holds_nf4(base.config, base.path)
    onto = None if is_nf4 else find_quantisation(request)
    quantised = is_nf4 or onto is not None
    form = choose_form(architecture, quantised, request.dtype, request.device, base.path)
    # A GPU quantises in seconds what a processor takes minutes for, and a 16-bit model would be kept twice.
    kept = request.cache and quantised and form.device.type == "cpu"
    file = snapshot_file(identify(request, onto, form)) if kept else None
    if file is not None and file.is_file():
        weights = map_snapshot(file)
    else:
        weights = build_weights(open_model(request, base, is_nf4, onto, form.device), architecture, form)
        if file is not None:
            weights = keep_snapshot(weights, file)
    logger.info("%s: %s", request.model_dir, form)
    return Decoder(architecture, pack_weights(weights)), form


def read_trained_config(request: Request, base: Base) -> dict[str, Any]:
    """config.json of the base, as the adapter was trained on it where there is one."""
    cards = [] if request.base_dir is None else [(read_card(request.model_dir), request.model_dir / CARD)]
    return scale_as_trained(base.config, cards, base.path)


def keep_snapshot(weights: Weights, file: Path) -> Weights:
    """Write the snapshot and go on with it, so that the first load computes with what later ones do.

    Where it cannot be written the weights, which are in memory already, are used as they are.
    """
    try:
        write_snapshot(weights, file)
    except DiskError as error:
        logger.warning("%s", error)
        return weights
    logger.info("snapshot written to %s", file)
    return map_snapshot(file)


def find_quantisation(request: Request) -> Nf4Format | None:
    """How the blocks' matrices are to be quantised; None leaves them as the folder has them.

    Raises:
        ConfigError: NF4 is asked for beneath an adapter that PiSSA trained.
    """
    if request.quantization == "none":
        return None
    if request.base_dir is None and request.quantization != "nf4":
        return None
    if request.base_dir is None and request.held_as is None:
        return Nf4Format(True, torch.float32)
    if request.base_dir is None and request.held_as is not None:
        return read_training(open_adapter(request.held_as), double_quantization=True, precision=Precision.float32)[1]
    adapter = open_adapter(request.model_dir)
    # PiSSA trains beside what it leaves of the base: NF4 of the whole base is not what it was trained on.
    by_pissa = adapter.card.get("trained_on", {}).get("method") == AdapterMethod.pissa.value
    if by_pissa and request.quantization == "nf4":
        raise ConfigError(
            "quantization=nf4, but this adapter was trained by PiSSA beside a part of the base that is kept nowhere; "
            "use quantization=none."
        )
    if by_pissa:
        return None
    if "trained_on" not in adapter.card and request.quantization == "auto":
        logger.warning(
            "%s does not say how its base was held in training; it is taken as it is (quantization=nf4 for a QLoRA "
            "adapter).",
            adapter.folder,
        )
        return None
    trained_on, form = read_training(adapter, double_quantization=True, precision=Precision.float32)
    return form if request.quantization == "nf4" or trained_on is Quantization.nf4 else None


def open_model(request: Request, base: Base, is_nf4: bool, onto: Nf4Format | None, device: torch.device) -> Model:
    """The tensors of the folders, with an adapter's changes, quantised and merged on `device`."""
    if request.base_dir is not None:
        merge = plan_merge(base.path, [request.model_dir], MergeOnto["16bit"], True, Precision.auto)
        for note in merge.notes:
            logger.warning(note)
        return Model(base, MergedSource(merge.source.base, merge.source.plan, onto, device), is_nf4=False)
    reader = ShardReader(base.path)
    return Model(base, MergedSource(reader, MergePlan(tied=is_tied(base, reader)), onto, device), is_nf4)


def identify(request: Request, onto: Nf4Format | None, form: Form) -> dict[str, str]:
    """Everything that the decoder's weights, and the checks before they were made, depend on."""
    identity = {"weights": fingerprint_weights(request.folder), "onto": str(onto), "form": str(form)}
    files = [request.folder / "config.json", request.folder / "tokenizer.json"]
    if request.base_dir is not None:
        identity["adapter"] = fingerprint_adapter(request.model_dir)
        files += [request.model_dir / "adapter_config.json", request.model_dir / CARD]
    for file in files:
        if file.is_file():
            identity[str(len(identity))] = hash_file(file)
    return identity
