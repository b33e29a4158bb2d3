"""The list of model kinds, and what put each on it: stock transformers' losses and gradients."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from cqlora.architectures import MODEL_TYPES, Part, find_window, require_known
from cqlora.base import read_base
from cqlora.config.base_shape import read_shape
from cqlora.config.choices import Attention, Device, Embeddings, Quantization
from cqlora.config.schema import HardwareConfig, LoraConfig, ModelConfig
from cqlora.errors import ModelError
from cqlora.launch.preflight import check_run
from cqlora.launch.settle import look_around
from cqlora.model.adapters import adapter_state, attach_adapter, save_adapter
from cqlora.model.batch import build_batch
from cqlora.model.fused import fuse_blocks
from cqlora.model.fused.linear import FusedLinear
from cqlora.model.fused.mlp import FusedMLP
from cqlora.model.load import load_base
from cqlora.model.objective import Objective
from tests.conftest import run_verb
from tests.kinds import OPTIONS, VARIANTS, write_kind
from tests.runs import build_base, typed_run

CPU = torch.device("cpu")
DOCUMENTS = [9, 20, 3]
TRAINED = [*VARIANTS, ("llama", {"hidden_act": "gelu"}), ("mistral", {"sliding_window": 20})]


def configured(folder: Path) -> ModelConfig:
    return ModelConfig(
        name="mine", path=str(folder), quantization=Quantization.none, attention=Attention.documents,
        **read_shape(folder),
    )  # fmt: skip


def pack() -> SimpleNamespace:
    tokens = np.random.default_rng(0).integers(3, 320, sum(DOCUMENTS))
    return SimpleNamespace(
        token_ids=tokens, label_mask=np.ones(len(tokens), bool), document_lengths=DOCUMENTS, source_ids=[0, 0, 0]
    )


def stock_gradients(folder: Path, adapter: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over all labels and its gradients by plain transformers and PEFT, each document alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
    labels, total = sum(DOCUMENTS) - len(DOCUMENTS), 0.0
    for begin, end in itertools.pairwise(np.cumsum([0, *DOCUMENTS])):
        tokens = torch.from_numpy(pack().token_ids[begin:end])[None]
        loss = adapted(input_ids=tokens, labels=tokens, use_cache=False).loss * (end - begin - 1) / labels
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind, options", TRAINED, ids=str)
def test_a_known_kind_has_the_losses_and_gradients_of_stock_transformers(kind, options, tmp_path):
    folder = write_kind(kind, tmp_path / "base", **options)
    base = read_base(folder)
    require_known(Part.train, base.config, folder, max(DOCUMENTS))
    model = load_base(base, configured(folder), HardwareConfig(name="cpu", device=Device.cpu), CPU, torch.float32)
    adapted = attach_adapter(model, base, LoraConfig(rank=4, alpha=8), Embeddings.lora, "").train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    save_adapter(adapted, tmp_path / "adapter", base, adapter_state(adapted))
    fuse_blocks(adapted)
    fused = [type(module) for module in adapted.model.model.layers.modules()]
    assert fused.count(FusedLinear) == 7 * 4 and fused.count(FusedMLP) == (0 if "hidden_act" in options else 4)
    loss, _ = Objective(adapted, torch.float32, autocast=False)(
        build_batch([pack()], CPU), sum(DOCUMENTS) - len(DOCUMENTS)
    )
    loss.backward()
    expected, gradients = stock_gradients(folder, tmp_path / "adapter")
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    found = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert found.keys() == gradients.keys() and len(found) > 50
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * scale, rtol=1e-3, msg=name)


def test_attention_by_document_refuses_a_document_beyond_the_window_of_its_layer(tmp_path):
    folder = write_kind("mistral", tmp_path / "base", sliding_window=max(DOCUMENTS) - 1)
    hardware = HardwareConfig(name="cpu", device=Device.cpu)
    model = load_base(read_base(folder), configured(folder), hardware, CPU, torch.float32)
    with pytest.raises(ModelError, match="a document of 20 tokens is longer than the layer's window of 19"):
        Objective(model, torch.float32, autocast=False)(build_batch([pack()], CPU), 1.0)


def test_every_kind_that_trains_is_tested_above():
    assert OPTIONS.keys() == {kind for kind, parts in MODEL_TYPES.items() if Part.train in parts}


REFUSED = [
    ({"model_type": "granite"}, "a granite model; cqlora trains llama, mistral, qwen2, qwen3 and smollm3 only"),
    ({"model_type": "gemma3", "text_config": {}}, "a gemma3 model, which is multi-modal"),
    ({"model_type": "mixtral", "num_local_experts": 8}, "a mixtral model, which is a mixture of experts"),
    ({"model_type": "gemma2", "sliding_window": 4096}, "a gemma2 model"),
    ({}, "a config.json without model_type"),
    ({"model_type": "mistral"}, "sliding window of 4096 tokens and documents of up to 8192 are read"),
    ({"model_type": "mistral", "sliding_window": 64}, "stage.sequence_length=64"),
    ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8}, "window of 8"),
]


@pytest.mark.parametrize("config, message", REFUSED, ids=lambda each: str(each)[:40])
def test_what_is_not_on_the_list_or_has_a_window_in_use_is_refused(config, message):
    for part in (Part.train, Part.plan):
        with pytest.raises(ModelError, match=message.replace("cqlora trains", part.value)):
            require_known(part, config, Path("models/mine"), 8192)


@pytest.mark.parametrize("part", Part, ids=lambda part: part.name)
@pytest.mark.parametrize(
    "config, words",
    [({"model_type": "mistral", "sliding_window": 64}, "sliding window of 64 tokens"),
     ({"model_type": "gemma3", "text_config": {}}, "a gemma3 model, which is multi-modal"),
     ({"model_type": "qwen3_moe", "num_experts": 8}, "a qwen3_moe model, which is a mixture of experts"),
     ({"model_type": "qwen2_moe", "num_experts": 8}, "a qwen2_moe model, which is a mixture of experts")],
    ids=lambda each: str(each)[:40],
)  # fmt: skip
def test_every_part_refuses_windows_experts_and_several_modalities_in_one_sentence(part, config, words):
    with pytest.raises(ModelError, match=words) as refused:
        require_known(part, config, Path("models/mine"))
    assert str(refused.value).count(". ") == 0 and str(refused.value).endswith(".")


@pytest.mark.parametrize("kind", ["granite", "qwen3_moe"])
def test_the_engine_names_what_runs_the_kinds_that_it_does_not(kind):
    with pytest.raises(ModelError, match=rf"a {kind} model.*; the engine runs llama, .* run this one with .* vLLM\.$"):
        require_known(Part.engine, {"model_type": kind}, Path("models/mine"))


@pytest.mark.parametrize(
    "part, option, words",
    [(Part.engine, {"hidden_act": "gelu"}, "the engine runs silu only; run this one with transformers or vLLM"),
     (Part.gguf, {"hidden_act": "gelu"}, "format=gguf writes silu only; use format=safetensors"),
     (Part.gguf, {"attention_bias": True}, "bias in q_proj, k_proj, v_proj and o_proj, and format=gguf writes layers"),
     (Part.gguf, {"mlp_bias": True}, "bias in gate_proj, up_proj and down_proj, and format=gguf writes layers")],
    ids=str,
)  # fmt: skip
def test_options_that_a_part_does_not_compute_are_refused_with_what_does(part, option, words):
    with pytest.raises(ModelError, match=words):
        require_known(part, {"model_type": "llama"} | option, Path("models/mine"))
    require_known(part, {"model_type": "llama", "hidden_act": "silu", "attention_bias": False}, Path("models/mine"))


@pytest.mark.parametrize(
    "config, window",
    [({"model_type": "mistral"}, 4096), ({"model_type": "mistral", "sliding_window": None}, None),
     ({"model_type": "qwen2", "sliding_window": 64}, None), ({"model_type": "llama", "sliding_window": 64}, None),
     ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, 64)],
    ids=str,
)  # fmt: skip
def test_the_window_is_the_one_that_transformers_reads(config, window):
    assert find_window(config) == window
    read = AutoConfig.for_model(**config)
    assert (None if config["model_type"] == "llama" else read.sliding_window) == window


def test_a_run_and_its_plan_and_its_preparation_are_refused_before_anything_is_loaded(workspace, tmp_path):
    base = build_base(workspace, tmp_path / "base", tied=False)
    file = base / "config.json"
    config = json.loads(file.read_text())
    accepted = typed_run(workspace, "stage=pretrain", f"model.path={base}")
    file.write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": 16}))
    with pytest.raises(ModelError, match="sliding window of 16 tokens"):
        check_run(accepted, look_around(accepted, tmp_path))
    for verb in ("plan", "prepare"):
        done = run_verb(workspace, verb, "stage=pretrain", "model=tiny", "hardware=cpu", f"model.path={base}", expect=1)
        assert "sliding window of 16 tokens" in done.stderr and "Traceback" not in done.stderr


STRANGERS = {
    "a Mistral with a window": ({"sliding_window": 16}, "attends within a sliding window of 16 tokens"),
    "a Gemma 3": ({"model_type": "gemma3", "text_config": {}}, "model, which is multi-modal"),
    "a Qwen MoE": ({"model_type": "qwen3_moe", "num_experts": 8}, "a qwen3_moe model, which is a mixture of experts"),
}
RUN = ["stage=pretrain", "data=sample", "hardware=cpu", "tracking=none", "model=auto", "stage.sequence_length=64"]
COMMANDS = {
    "run": [*RUN, "model.path=base"],
    "plan": [*RUN, "model.path=base"],
    "merge": ["base=base", "adapter=[]", "format=gguf", "output_dir=gguf"],
    "chat": ["base=base"],
}


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("changed, words", STRANGERS.values(), ids=STRANGERS)
def test_each_command_refuses_what_is_not_in_the_table_in_one_sentence(verb, changed, words, tmp_path):
    file = write_kind("mistral", tmp_path / "base") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    before = sorted(tmp_path.rglob("*"))
    # The shape of model=auto is read while the configuration is composed, windows are looked at with the base.
    composed = verb in ("run", "plan") and "window" not in words
    done = run_verb(tmp_path, verb, *COMMANDS[verb], expect=2 if composed else 1)
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
