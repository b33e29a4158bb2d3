"""Attach, continue, save: the trainable low-rank matrices and embedding rows, as plain PEFT adapters."""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cqlora.base import (
    ADAPTER_WEIGHTS,
    README,
    Base,
    fingerprint_tokenizer,
    fingerprint_weights,
    read_card,
    seal_card,
)
from cqlora.config.choices import AdapterMethod, Embeddings, Quantization
from cqlora.config.schema import LoraConfig
from cqlora.errors import ConfigError, ModelError
from cqlora.lineage import check_fingerprints, describe_lineage
from cqlora.model.load import find_decoder
from cqlora.model.masters import keep_masters, restore_masters
from cqlora.system.companions import hash_companions
from cqlora.system.durable import staged_folder
from cqlora.system.refusals import require_space

logger = logging.getLogger(__name__)

EMBEDDING_MODULES = ("embed_tokens", "lm_head")


def attach_adapter(
    model: PreTrainedModel, base: Base, lora: LoraConfig, embeddings: Embeddings, init_adapter: str
) -> PeftModel:
    """Put a new adapter on a frozen base, or the one in `init_adapter`, ready to train.

    Where that one holds embeddings alone and `lora` has a method, new low-rank matrices come beside them.

    Raises:
        ConfigError: target modules that the model does not have.
        ModelError: an adapter of another base or tokenizer.
    """
    if keeps_shape(lora, init_adapter):
        return continue_adapter(model, base, lora, Path(init_adapter))
    adapted: PeftModel = get_peft_model(model, peft_config(model, base, lora, embeddings))
    keep_masters(adapted)
    if init_adapter:
        check_fingerprints(Path(init_adapter), fingerprint_tokenizer(base.path), fingerprint_weights(base.path))
        set_peft_model_state_dict(adapted, load_file(Path(init_adapter, ADAPTER_WEIGHTS)))
    return adapted


def keeps_shape(lora: LoraConfig, init_adapter: str) -> bool:
    """Whether a run trains the matrices of the adapter that it continues; one of embeddings alone gets others too."""
    if not init_adapter or lora.method is AdapterMethod.none:
        return bool(init_adapter)
    with safe_open(Path(init_adapter, ADAPTER_WEIGHTS), framework="pt") as weights:
        return any(".lora_" in name for name in weights.keys())  # noqa: SIM118 - not a mapping


def continue_adapter(model: PreTrainedModel, base: Base, lora: LoraConfig, folder: Path) -> PeftModel:
    """Load an adapter to train on, as it was but for its dropout; `launch.continuation` has compared the rest."""
    check_fingerprints(folder, fingerprint_tokenizer(base.path), fingerprint_weights(base.path))
    config = PeftLoraConfig.from_pretrained(folder)
    # Before the layers are made: only layers made without dropout can be fused.
    config.lora_dropout = lora.dropout
    adapted: PeftModel = PeftModel.from_pretrained(model, folder, is_trainable=True, config=config)
    if keep_masters(adapted):
        restore_masters(adapted, folder / ADAPTER_WEIGHTS)
    return adapted


def peft_config(model: nn.Module, base: Base, lora: LoraConfig, embeddings: Embeddings) -> PeftLoraConfig:
    """PEFT's configuration of a new adapter."""
    targets = [] if lora.method is AdapterMethod.none else list(resolve_targets(model, lora.target_modules))
    matrices = EMBEDDING_MODULES[:1] if base.tied else EMBEDDING_MODULES
    options: dict[str, Any] = {}
    if embeddings is Embeddings.lora:
        targets += EMBEDDING_MODULES
        options["ensure_weight_tying"] = base.tied
    elif embeddings is Embeddings.full:
        options["modules_to_save"] = list(matrices)
        options["ensure_weight_tying"] = base.tied
    elif embeddings is Embeddings.new_rows:
        options["trainable_token_indices"] = {matrix: added_row_indices(base) for matrix in matrices}
    return PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # PEFT takes no empty list.
        target_modules=targets or DUMMY_TARGET_MODULES,
        use_rslora=lora.method is AdapterMethod.rslora,
        use_dora=lora.method is AdapterMethod.dora,
        base_model_name_or_path=str(base.path),
        **options,
    )


def resolve_targets(model: nn.Module, names: list[str]) -> list[str]:
    """Names of the linear layers to adapt; `["all"]` is each kind that the blocks have.

    Raises:
        ConfigError: a name that no linear layer of the blocks has.
    """
    linear = {
        name.rpartition(".")[2] for name, module in find_decoder(model).named_modules() if isinstance(module, nn.Linear)
    }
    if names == ["all"]:
        return sorted(linear)
    for name in names:
        if name not in linear:
            raise ConfigError(
                f"lora.target_modules names {name}, which this model does not have; use [all] or some of "
                f"[{','.join(sorted(linear))}]."
            )
    return names


def added_row_indices(base: Base) -> list[int]:
    """Rows of the embedding that an extension added and tokens use."""
    if base.first_added_row is None:
        raise ModelError(f"{base.path} has no added rows; extend it with `cqlora extend` first.")
    return list(range(base.first_added_row, base.first_added_row + base.added_rows))


def save_adapter(
    model: PeftModel,
    folder: Path,
    base: Base,
    state: dict[str, torch.Tensor],
    stage: str = "",
    card: dict[str, Any] | None = None,
    page: str = "",
) -> None:
    """Write the adapter as plain PEFT, with the card that says what it was trained on, whole or not at all.

    `state` holds whole tensors under PEFT's names, of the trained rank or, as PiSSA's conversion leaves them, of
    twice that at the same scaling. A merge gives what came of `stage` sft the chat template that it was trained in.
    `card` is what the card says beside: the lineage as it was when the run started (`describe_lineage`), and the
    `system_prompt` that conversations without a system message were trained with. `page` is README.md, for people
    alone: nothing is compared with it, and no fingerprint covers it.
    """
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    for name, value in vars(config).items():
        if isinstance(value, set):
            # PEFT writes a set in the order of this process's hashes, which the next one does not have.
            setattr(config, name, sorted(value))
    rank_factor = count_rank_factor(model, state)
    config.r, config.lora_alpha = config.r * rank_factor, config.lora_alpha * rank_factor
    trained_on = describe_training(model, rank_factor) | ({"stage": stage} if stage else {})
    with staged_folder(folder, replace=True) as staging:
        require_space(staging, sum(tensor.nbytes for tensor in state.values()))
        config.save_pretrained(staging)
        save_file(state, staging / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_card(staging, base, trained_on, card or describe_lineage(""))
        if page:
            (staging / README).write_text(page, encoding="utf-8")
    logger.info("adapter written to %s", folder)


def count_rank_factor(model: PeftModel, state: dict[str, torch.Tensor]) -> int:
    """How many times the rank that it was trained with a matrix of the state has: twice after PiSSA's conversion."""
    for name, module in model.named_modules():
        factor = state.get(f"{name}.lora_A.weight")
        if factor is not None:
            return len(factor) // int(module.r["default"])
    return 1


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's names, whole and on the host; every rank of a sharded run calls it.

    The base is the extended model itself, so its embedding is never copied into the adapter.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    whole = {name: gather_tensor(tensor).detach().cpu().contiguous() for name, tensor in state.items()}
    return separate_memory(whole)


def separate_memory(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, each in memory of its own: safetensors refuses what tied matrices share."""
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.data_ptr() in seen:
            state[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return state


def gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor made whole; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def describe_training(model: PeftModel, rank_factor: int) -> dict[str, Any]:
    """How the base was held while the adapter trained, which decides what a merge would have to add it to."""
    held: Any = getattr(model.config, "quantization_config", None)
    quantization = Quantization.none if held is None else Quantization.nf4 if held.load_in_4bit else Quantization.int8
    nf4 = quantization is Quantization.nf4
    return {
        "quantization": quantization.name,
        "double_quantization": nf4 and bool(held.bnb_4bit_use_double_quant),
        "dtype": str(held.bnb_4bit_compute_dtype if nf4 else model.dtype).removeprefix("torch."),
        "method": "pissa" if rank_factor > 1 else "lora",
    }


def write_card(folder: Path, base: Base, trained_on: dict[str, Any], said: dict[str, Any]) -> None:
    """Say beside an adapter which base and tokenizer it belongs to, how that base was held, and what else is `said`."""
    card = {
        "base": str(base.path),
        "base_sha256": fingerprint_weights(base.path),
        "tokenizer_sha256": fingerprint_tokenizer(base.path),
        "companions": hash_companions(base.path),
        "trained_on": trained_on,
        **said,
    }
    merged = read_card(base.path).get("merged")
    seal_card(folder, card | ({"base_merged": merged} if merged else {}))
