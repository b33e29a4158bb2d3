"""Every kind of model trains as stock transformers, PEFT and bitsandbytes train it, and merges as it trained."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cqlora.base import read_base
from cqlora.data.cache import prepare_cache
from cqlora.data.order import StepOrder
from tests.conftest import run_verb
from tests.kinds import OPTIONS, VARIANTS, write_kind
from tests.runs import finish_run, losses, typed_run
from tests.train.test_trainer import split_documents
from tests.weights.adapters import attach, load, logits

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE, STEPS, CLIP = 5e-3, 3, 1.0
EPSILON = 1e-4
"""Adam's, large: with a small one it divides gradients near zero by themselves, rounding and all."""
RUN = ("stage=pretrain", "model=auto", "lora.dropout=0", f"stage.max_steps={STEPS}", f"stage.learning_rate={RATE}",
       "stage.schedule=constant", "stage.warmup_steps=0", f"stage.adam_epsilon={EPSILON}", "stage.weight_decay=0",
       f"stage.max_grad_norm={CLIP}", "stage.sequence_length=96")  # fmt: skip
Documents = list[tuple[torch.Tensor, torch.Tensor]]


def load_nf4(folder: Path) -> torch.nn.Module:
    """A folder's model as transformers and bitsandbytes quantise it, computing in float32."""
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=how, attn_implementation="eager"
    )


def write_start(base: Path, folder: Path) -> Path:
    """An adapter of PEFT's own writing, its B not zero, so that every matrix moves from the first step on."""
    model = get_peft_model(
        load_nf4(base), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=TARGETS)
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


def batches_of(config, steps: int) -> Iterator[Documents]:
    """The documents of each step's global batch, tokens and label mask."""
    cache = prepare_cache(config, read_base(config.model.path))
    order = StepOrder(len(cache.splits["train"]), config.stage.global_batch_size, config.seed)
    for step in range(steps):
        packs = [cache.splits["train"].pack(pack) for pack in order.packs_of_step(step)]
        yield [document for pack in packs for document in split_documents(pack)]


def train_stock(base: Path, start: Path, batches: Iterator[Documents]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of the steps and the adapter after them: each document alone, the mean over all label tokens."""
    model = PeftModel.from_pretrained(load_nf4(base), start, is_trainable=True).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, recorded = torch.optim.AdamW(trained.values(), lr=RATE, eps=EPSILON, weight_decay=0.0), []
    for documents in batches:
        labels, total = sum(int(mask[1:].sum()) for _, mask in documents), 0.0
        for tokens, mask in documents:
            scores = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(scores, tokens[1:], reduction="none")
            loss = each[mask[1:]].sum() / labels
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        recorded.append(total)
    return recorded, {name.replace(".default.", "."): tensor.detach() for name, tensor in trained.items()}


@pytest.mark.parametrize("kind, options", VARIANTS, ids=str)
def test_three_nf4_steps_are_those_of_stock_transformers_and_peft(kind, options, workspace, tmp_path):
    base = write_kind(kind, tmp_path / "base", **options)
    start = write_start(base, tmp_path / "start")
    config = typed_run(workspace, *RUN, f"model.path={base}", f"stage.init_adapter={start}")
    assert finish_run(config, tmp_path / "run") == 0
    expected, weights = train_stock(base, start, batches_of(config, STEPS))
    assert [loss for _, loss in losses(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)
    trained, began = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "run/adapter", start))
    assert trained.keys() == weights.keys() and len(trained) == 2 * len(TARGETS) * 4
    for name, tensor in weights.items():
        assert float((tensor - began[name]).abs().max()) > 1e-3, f"{name} hardly moved"
        torch.testing.assert_close(trained[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("kind", OPTIONS)
def test_what_trained_merges_into_a_model_of_the_same_logits(kind, workspace, tmp_path):
    base = write_kind(kind, tmp_path / "base")
    config = typed_run(workspace, *RUN, "model.quantization=none", f"model.path={base}")
    assert finish_run(config, tmp_path / "run") == 0
    adapter = tmp_path / "run" / "adapter"
    run_verb(tmp_path, "merge", f"base={base}", f"adapter={adapter}", "output_dir=merged")
    unmerged = logits(attach(load(base), adapter))
    assert (unmerged - logits(load(base))).abs().max() > 0.01
    torch.testing.assert_close(logits(load(tmp_path / "merged")), unmerged, atol=1e-4, rtol=1e-4)
