"""How far a merged model's answers are from the trained one's: the adapter on the base as training held it.

An adapter trained on NF4 weights has learnt to make up for their rounding too, so that neither merge gives the
same model: onto 16 bits it meets other weights, onto NF4 the sum is rounded to 16 bits. Both are measured.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from cqlora.config.choices import MergeOnto, Quantization
from cqlora.errors import DataError
from cqlora.model.fused.linear import keep_trainable_layout
from cqlora.model.load import nf4_config
from cqlora.system.model_config import DERIVED, INPUT, OUTPUT
from cqlora.weights.merge import Merge
from cqlora.weights.merge_plan import MergedSource
from cqlora.weights.nf4 import Nf4Format

WINDOW = 512


@dataclass(frozen=True, slots=True)
class Drift:
    """Distance of two models' logits on a text."""

    maximum: float
    mean: float
    """Of the absolute difference of two logits."""
    agreement: float
    """Share of places at which both would say the same token first."""


def measure_drifts(merge: Merge, trained_on: Quantization, form: Nf4Format, text: Path, tokens: int) -> str:
    """A table of the drift of each kind of merge on the first tokens of a text, computed in float32.

    Models are held one after the other; each needs the memory of the whole base in float32.

    Raises:
        DataError: a text of less than two tokens.
    """
    transformers_logging.disable_progress_bar()
    windows = read_windows(merge.base.path, text, tokens)
    trained = compute_logits(load_trained(merge, trained_on, form), windows)
    kinds = [(MergeOnto["16bit"], None)] + [(MergeOnto["nf4"], form)] * (trained_on is Quantization.nf4)
    lines = [f"{'onto':8}{'largest':>12}{'mean':>12}{'same first token':>20}"]
    for onto, kept in kinds:
        source = MergedSource(merge.source.base, merge.source.plan, kept)
        drift = compare(trained, compute_logits(load_merged(source, merge.config()), windows))
        lines.append(f"{onto.value:8}{drift.maximum:12.4f}{drift.mean:12.5f}{drift.agreement:19.2%}")
    return "\n".join(lines)


def read_windows(folder: Path, text: Path, tokens: int) -> list[torch.Tensor]:
    """The first tokens of a text, in windows of [1, up to 512]."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][:tokens]
    if len(ids) < 2:
        raise DataError(f"measure={text} holds {len(ids)} tokens; give a file of text.")
    return list(torch.tensor([ids]).split(WINDOW, dim=1))


def load_trained(merge: Merge, trained_on: Quantization, form: Nf4Format) -> Any:
    """The base as training held it, with the adapter beside it."""
    quantization = {
        Quantization.none: None,
        Quantization.int8: BitsAndBytesConfig(load_in_8bit=True),
        Quantization.nf4: nf4_config(form.double_quantization, form.dtype),
    }[trained_on]
    base = AutoModelForCausalLM.from_pretrained(
        merge.base.path,
        config=open_config(merge.trained_config()),
        dtype=form.dtype,
        quantization_config=quantization,
        local_files_only=True,
    )
    keep_trainable_layout(base)
    return PeftModel.from_pretrained(base, merge.adapters[0].folder)


def load_merged(source: MergedSource, config: dict[str, Any]) -> PreTrainedModel:
    """A merged model in float32, filled from its source without a file between."""
    model = AutoModelForCausalLM.from_config(open_config(config), dtype=torch.float32)
    stored = [name for name in source.specs if not name.endswith(DERIVED)]
    state = {name: torch.cat(list(source.blocks(name))).float() for name in stored}
    if source.plan.tied:
        state[OUTPUT] = state[INPUT]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    loaded: PreTrainedModel = model
    return loaded


def open_config(config: dict[str, Any]) -> PreTrainedConfig:
    """transformers' configuration of a config.json."""
    known = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    return AutoConfig.for_model(config["model_type"], **known)


@torch.inference_mode()
def compute_logits(model: Any, windows: list[torch.Tensor]) -> torch.Tensor:
    """Logits of every place of every window, [tokens, vocabulary], in float32."""
    model.eval()
    return torch.cat([model(input_ids=window, use_cache=False).logits[0].float() for window in windows])


def compare(trained: torch.Tensor, merged: torch.Tensor) -> Drift:
    """How far two models' logits are apart."""
    apart = (trained - merged).abs()
    same = (trained.argmax(dim=1) == merged.argmax(dim=1)).float().mean()
    return Drift(float(apart.max()), float(apart.mean()), float(same))
