"""What trains, what is saved, and that plain PEFT reads it back, for every method, quantisation and embedding."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cqlora.base import read_base, read_card
from cqlora.config.choices import AdapterMethod, Attention, Device, Embeddings, Quantization
from cqlora.config.schema import HardwareConfig, LoraConfig, ModelConfig
from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.errors import ConfigError, ModelError
from cqlora.model.adapters import adapter_state, attach_adapter, save_adapter
from cqlora.model.load import load_base
from cqlora.model.pissa import convert_to_lora, initialise_pissa
from cqlora.model.tiny import build_tiny
from tests.cards import change_card

CPU = torch.device("cpu")
HARDWARE = HardwareConfig(name="cpu", device=Device.cpu)
TEXTS = ["长江是亚洲最长的河流。", "The Yangtze is the longest river in Asia."] * 20
FIRST, ADDED = 400, 50


def count_trainable(model) -> int:
    """Trainable parameters, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def shape(folder: Path, tied: bool, quantization: Quantization = Quantization.none) -> ModelConfig:
    return ModelConfig(
        name="tiny", path=str(folder), vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied,
        quantization=quantization, attention=Attention.documents,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def extended(request, tmp_path_factory) -> Path:
    """A base whose card says that rows 400 to 449 were added."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    build_tiny(shape(folder, request.param), TEXTS, CHAT_TEMPLATE)
    (folder / "cqlora.json").write_text(json.dumps({"first_added_row": FIRST, "added_rows": ADDED}))
    return folder


def load(folder: Path, quantization: Quantization = Quantization.none):
    base = read_base(folder)
    return base, load_base(base, shape(folder, base.tied, quantization), HARDWARE, CPU, torch.float32)


def train_a_little(model, tokens=None, rate: float = 0.05) -> None:
    """Two steps, so that every matrix of the adapter moves."""
    tokens = torch.arange(FIRST - 20, FIRST + 20)[None] if tokens is None else tokens
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model, tokens=None) -> torch.Tensor:
    tokens = torch.arange(FIRST - 20, FIRST + 20)[None] if tokens is None else tokens
    with torch.no_grad():
        return model.eval()(input_ids=tokens, use_cache=False).logits


COMBINATIONS = [
    (method, quantization)
    for method in (AdapterMethod.lora, AdapterMethod.rslora, AdapterMethod.dora)
    for quantization in Quantization
    if (method, quantization) != (AdapterMethod.dora, Quantization.int8)
]
"""All that runs on a CPU; preflight refuses the one left out."""


@pytest.mark.parametrize("embeddings", [Embeddings.frozen, Embeddings.lora, Embeddings.full])
def test_adapter_config_json_has_one_order_whatever_the_process_hashes(embeddings, extended, tmp_path):
    base, model = load(extended)
    adapted = attach_adapter(model, base, LoraConfig(rank=4), embeddings, "")
    save_adapter(adapted, tmp_path / "adapter", base, adapter_state(adapted))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) >= 7 and config["target_modules"] == sorted(config["target_modules"])
    assert (config["modules_to_save"] or []) == sorted(config["modules_to_save"] or [])


@pytest.mark.parametrize("method, quantization", COMBINATIONS)
def test_a_saved_adapter_read_by_plain_peft_computes_what_was_trained(method, quantization, extended, tmp_path):
    base, model = load(extended, quantization)
    adapted = attach_adapter(model, base, LoraConfig(method=method, rank=4), Embeddings.frozen, "")
    train_a_little(adapted)
    save_adapter(adapted, tmp_path / "adapter", base, adapter_state(adapted))
    _, fresh = load(extended, quantization)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(adapted), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(again), logits(load(extended, quantization)[1]), atol=1e-3)


def test_new_rows_train_the_added_rows_of_both_matrices_and_nothing_else_of_them(extended, tmp_path):
    base, model = load(extended)
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapted = attach_adapter(model, base, LoraConfig(rank=4), Embeddings.new_rows, "")
    matrices = 1 if base.tied else 2
    lora = attach_adapter(load(extended)[1], base, LoraConfig(rank=4), Embeddings.frozen, "")
    assert count_trainable(adapted) - count_trainable(lora) == matrices * ADDED * 64
    train_a_little(adapted)
    state = adapter_state(adapted)
    rows = {name: tensor for name, tensor in state.items() if "lora" not in name}
    assert len(rows) == matrices and all(tensor.shape == (ADDED, 64) for tensor in rows.values())
    assert not [name for name in state if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    save_adapter(adapted, tmp_path / "adapter", base, state)
    fresh = PeftModel.from_pretrained(load(extended)[1], tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), logits(adapted), atol=1e-5, rtol=1e-5)
    merged = fresh.merge_and_unload()
    for name in ("embed_tokens", "lm_head"):
        matrix = merged.get_input_embeddings() if name == "embed_tokens" else merged.get_output_embeddings()
        old = before["model.embed_tokens.weight"] if base.tied or name == "embed_tokens" else before["lm_head.weight"]
        changed = (matrix.weight != old).any(dim=1).nonzero().flatten()
        assert changed.numel() and changed.min() >= FIRST and changed.max() < FIRST + ADDED, name


@pytest.mark.parametrize("embeddings", [Embeddings.lora, Embeddings.full])
def test_low_rank_and_whole_embeddings_train_and_read_back(embeddings, extended, tmp_path):
    base, model = load(extended)
    adapted = attach_adapter(model, base, LoraConfig(rank=4), embeddings, "")
    train_a_little(adapted)
    save_adapter(adapted, tmp_path / "adapter", base, adapter_state(adapted))
    again = PeftModel.from_pretrained(load(extended)[1], tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(adapted), atol=1e-5, rtol=1e-5)
    names = " ".join(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert "embed_tokens" in names


@pytest.mark.parametrize("quantization", [Quantization.nf4, Quantization.none])
@pytest.mark.parametrize("iterations", [0, 16])
def test_pissa_starts_where_the_base_is_and_ends_as_a_lora_on_the_untouched_base(
    quantization, iterations, extended, tmp_path
):
    base, model = load(extended, quantization)
    _, original = load(extended)
    adapted = attach_adapter(model, base, LoraConfig(rank=4, method=AdapterMethod.pissa), Embeddings.frozen, "")
    initialise_pissa(adapted, base, tmp_path, iterations, seed=1)
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj
    weight = original.model.layers[0].mlp.up_proj.weight
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    left, values, right = torch.linalg.svd(weight)
    best = left[:, :4] @ torch.diag(values[:4]) @ right[:4]
    if iterations:
        # A random matrix has a flat spectrum, the worst case of a subspace iteration.
        assert (weight - product).norm() < 1.01 * (weight - best).norm()
    else:
        torch.testing.assert_close(product, best, atol=1e-4, rtol=1e-3)
    if quantization is Quantization.none:
        torch.testing.assert_close(logits(adapted), logits(original), atol=1e-4, rtol=1e-4)
        adapted.train()
        train_a_little(adapted, rate=0.01)
        state = convert_to_lora(adapted, adapter_state(adapted), tmp_path)
        save_adapter(adapted, tmp_path / "adapter", base, state)
        again = PeftModel.from_pretrained(load(extended)[1], tmp_path / "adapter")
        torch.testing.assert_close(logits(again), logits(adapted), atol=1e-4, rtol=1e-4)
    else:
        quantized = load(extended, quantization)[1]
        error = (logits(adapted) - logits(original)).abs().mean()
        assert error < (logits(quantized) - logits(original)).abs().mean() * 1.05


def test_pissa_is_set_up_again_from_what_the_run_folder_keeps(extended, tmp_path):
    base = read_base(extended)
    states = []
    for _ in range(2):
        model = load(extended, Quantization.nf4)[1]
        adapted = attach_adapter(model, base, LoraConfig(rank=4, method=AdapterMethod.pissa), Embeddings.frozen, "")
        initialise_pissa(adapted, base, tmp_path, 4, seed=len(states))
        states.append(logits(adapted))
    assert torch.equal(*states)


def test_named_layers_alone_are_adapted_and_unknown_ones_are_refused(extended):
    base, model = load(extended)
    adapted = attach_adapter(model, base, LoraConfig(target_modules=["q_proj", "v_proj"]), Embeddings.frozen, "")
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_state(adapted)}
    assert names == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"names w_pack.*q_proj"):
        attach_adapter(load(extended)[1], base, LoraConfig(target_modules=["w_pack"]), Embeddings.frozen, "")


def test_lora_parameters_at_rank_64_are_the_published_numbers():
    """7B, 13B, 33B and 65B: 159.9, 250.3, 487.6 and 799.5 million, counted from the matrices' shapes."""
    published = {
        "llama_7b": 159_907_840,
        "llama_13b": 250_347_520,
        "llama_33b": 487_587_840,
        "llama_65b": 799_539_200,
    }
    from omegaconf import OmegaConf

    from cqlora.config.schema import CONFIG_DIR

    for name, expected in published.items():
        m = OmegaConf.load(CONFIG_DIR / "model" / f"{name}.yaml")
        with torch.device("meta"):
            from transformers import LlamaConfig, LlamaForCausalLM

            one_layer = LlamaForCausalLM(LlamaConfig(
                vocab_size=8, hidden_size=m.hidden_size, intermediate_size=m.intermediate_size, num_hidden_layers=1,
                num_attention_heads=m.num_attention_heads, num_key_value_heads=m.num_key_value_heads,
            ))  # fmt: skip
        from cqlora.base import Base
        from cqlora.model.adapters import peft_config

        base = Base(Path("x"), {"vocab_size": 8}, Path("x"), None, 0)
        config = peft_config(one_layer, base, LoraConfig(rank=64), Embeddings.frozen)
        from peft import get_peft_model

        assert count_trainable(get_peft_model(one_layer, config)) * m.num_hidden_layers == expected


def test_an_adapter_of_another_base_or_tokenizer_is_refused(extended, tmp_path):
    base, model = load(extended)
    adapted = attach_adapter(model, base, LoraConfig(rank=4), Embeddings.frozen, "")
    save_adapter(adapted, tmp_path / "adapter", base, adapter_state(adapted))
    right = read_card(tmp_path / "adapter")
    for key, what in (("tokenizer_sha256", "tokenizer"), ("base_sha256", "base")):
        change_card(tmp_path / "adapter", **{**right, key: "v2-0"})
        with pytest.raises(ModelError, match=f"another {what}"):
            attach_adapter(load(extended)[1], base, LoraConfig(rank=4), Embeddings.frozen, str(tmp_path / "adapter"))


def test_saving_over_an_adapter_leaves_a_whole_one(extended, tmp_path):
    base, model = load(extended)
    adapted = attach_adapter(model, base, LoraConfig(rank=4), Embeddings.frozen, "")
    for _ in range(2):
        save_adapter(adapted, tmp_path / "adapter", base, adapter_state(adapted))
    assert {f.name for f in tmp_path.iterdir()} == {"adapter"}
    assert adapted.peft_config["default"].inference_mode is False


def test_a_folder_of_another_shape_is_refused_by_name(extended):
    base = read_base(extended)
    wrong = shape(extended, base.tied)
    wrong.num_hidden_layers = 3
    with pytest.raises(ModelError, match=r"num_hidden_layers=3 and .* has 2"):
        load_base(base, wrong, HARDWARE, CPU, torch.float32)


def test_tiny_is_built_once_and_the_same_every_time(tmp_path):
    for name in ("one", "other"):
        build_tiny(shape(tmp_path / name, False), TEXTS, CHAT_TEMPLATE)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    tokenizers = [(tmp_path / name / "tokenizer.json").read_text() for name in ("one", "other")]
    assert tokenizers[0] == tokenizers[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.config.vocab_size == 512
