"""An adapter that is trained on: what its files fix is kept or refused, what may change does."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file

from cqlora.base import read_base, read_card
from cqlora.config.choices import AdapterMethod, Device, Embeddings, Quantization
from cqlora.config.run_yaml import load_run_yaml
from cqlora.config.schema import HardwareConfig, LoraConfig
from cqlora.errors import ConfigError, ModelError
from cqlora.launch.continuation import read_fixed
from cqlora.model.adapters import adapter_state, attach_adapter, save_adapter
from cqlora.model.fused import fuse_blocks
from cqlora.model.load import load_base
from cqlora.model.pissa import convert_to_lora, initialise_pissa
from tests.conftest import run_verb
from tests.runs import SMALL, build_base, extend_tiny, finish_run, typed_run

CPU = torch.device("cpu")


def adapted_model(config, lora=None, embeddings=Embeddings.frozen, init_adapter=""):
    base = read_base(config.path)
    config.quantization = Quantization.none
    model = load_base(base, config, HardwareConfig(name="cpu", device=Device.cpu), CPU, torch.float32)
    return base, attach_adapter(model, base, lora or LoraConfig(rank=4), embeddings, init_adapter)


def make_adapter(workspace, folder, embeddings=Embeddings.frozen, **lora) -> str:
    """An adapter whose matrices are random, on the shared tiny base or on an extended one of its own."""
    extended = embeddings is Embeddings.new_rows
    path = extend_tiny(workspace, folder, False) if extended else build_base(workspace, folder / "base", False)
    config = typed_run(workspace, "stage=pretrain", f"model.path={path}").model
    options = LoraConfig(**{"rank": 4, **lora})
    base, model = adapted_model(config, options, embeddings)
    if options.method is AdapterMethod.pissa:
        initialise_pissa(model, base, folder, 4, seed=1)
    state = adapter_state(model)
    if options.method is AdapterMethod.pissa:
        state = convert_to_lora(model, state, folder)
    save_adapter(model, folder / "adapter", base, state)
    return str(path)


@pytest.fixture(scope="module")
def find_adapter(workspace, tmp_path_factory):
    """Adapters that are only read, each made once: the folder that it lies in, and its base's path."""
    made = {}

    def find(embeddings=Embeddings.frozen, **lora):
        key = (embeddings, str(lora))
        if key not in made:
            folder = tmp_path_factory.mktemp("adapter")
            made[key] = folder, make_adapter(workspace, folder, embeddings, **lora)
        return made[key]

    return find


def continued(workspace, folder, path, *overrides):
    return typed_run(workspace, "stage=sft", f"model.path={path}", f"stage.init_adapter={folder / 'adapter'}",
                     *overrides)  # fmt: skip


CONTRADICTIONS = [
    ("lora.rank=8", {}, Embeddings.frozen, "lora.rank=4 and not 8; type lora.rank=4"),
    ("lora.alpha=16", {}, Embeddings.frozen, "lora.alpha=32 and not 16; type lora.alpha=32"),
    ("lora.method=dora", {}, Embeddings.frozen, "lora.method=lora and not dora; type lora.method=lora"),
    ("lora.method=pissa", {}, Embeddings.frozen, "lora.method=lora and not pissa; type lora.method=lora"),
    ("lora.method=lora", {"method": AdapterMethod.rslora}, Embeddings.frozen, "lora.method=rslora and not lora"),
    ("lora.method=rslora", {"method": AdapterMethod.dora}, Embeddings.frozen, "lora.method=dora and not rslora"),
    ("lora.target_modules=[q_proj]", {}, Embeddings.frozen, "lora.target_modules=[all] and not [q_proj]"),
    ("lora.rank=4", {"target_modules": ["v_proj", "q_proj"]}, Embeddings.frozen,
     "lora.target_modules=[q_proj,v_proj] and not [all]; type lora.target_modules=[q_proj,v_proj]"),
    ("stage.embeddings=full", {}, Embeddings.frozen, "stage.embeddings=frozen and not full"),
    ("stage.embeddings=frozen", {}, Embeddings.lora, "stage.embeddings=lora and not frozen"),
    ("stage.embeddings=lora", {}, Embeddings.full, "stage.embeddings=full and not lora"),
    ("stage.embeddings=frozen", {}, Embeddings.new_rows, "stage.embeddings=new_rows and not frozen"),
    ("lora.method=pissa", {"method": AdapterMethod.pissa}, Embeddings.frozen,
     "lora.rank=8 and not 4, lora.alpha=64 and not 32, lora.method=lora and not pissa"),
]  # fmt: skip


@pytest.mark.parametrize(
    "override, lora, embeddings, message", CONTRADICTIONS, ids=[f"{c[0]} {c[3][:24]}" for c in CONTRADICTIONS]
)
def test_what_contradicts_the_adapter_is_refused_with_both_values_and_what_to_type(
    override, lora, embeddings, message, workspace, find_adapter
):
    folder, path = find_adapter(embeddings, **lora)
    with pytest.raises(ConfigError) as refused:
        continued(workspace, folder, path, override)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("embeddings", [Embeddings.frozen, Embeddings.lora, Embeddings.full, Embeddings.new_rows])
def test_embeddings_left_to_auto_are_the_adapters(embeddings, workspace, find_adapter):
    folder, path = find_adapter(embeddings)
    config = continued(workspace, folder, path)
    assert config.stage.embeddings is embeddings
    _, model = adapted_model(config.model, config.lora, config.stage.embeddings, config.stage.init_adapter)
    kept = load_file(folder / "adapter" / "adapter_model.safetensors")
    again = adapter_state(model)
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], kept[name]) for name in kept)


@pytest.mark.parametrize("before, after", [(0.0, 0.5), (0.5, 0.0)])
def test_dropout_is_that_of_the_run_whatever_the_adapter_had(before, after, workspace, tmp_path):
    path = make_adapter(workspace, tmp_path, dropout=before)
    config = continued(workspace, tmp_path, path, f"lora.dropout={after}")
    base, model = adapted_model(config.model, config.lora, Embeddings.frozen, config.stage.init_adapter)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == ({after} if after else set())
    # Without dropout every layer is plain enough to be fused.
    assert fuse_blocks(model) == (after == 0)
    save_adapter(model, tmp_path / "next", base, adapter_state(model))
    assert json.loads((tmp_path / "next" / "adapter_config.json").read_text())["lora_dropout"] == after


def test_a_continued_run_records_the_values_that_were_settled(workspace, tmp_path):
    path = make_adapter(workspace, tmp_path, Embeddings.new_rows)
    config = continued(workspace, tmp_path, path, "stage.max_steps=1", "lora.dropout=0.2", "model.quantization=none")
    assert finish_run(config, tmp_path / "run") == 0
    assert load_run_yaml(tmp_path / "run" / "run.yaml").stage.embeddings is Embeddings.new_rows
    card = read_card(tmp_path / "run" / "adapter")
    assert card["adapter"] == {
        "method": "lora", "rank": 4, "alpha": 32.0, "dropout": 0.2, "target_modules": ["all"], "embeddings": "new_rows",
    }  # fmt: skip
    assert card["init_adapter"]["path"] == str(tmp_path / "adapter")


def test_rows_of_another_extension_are_refused(workspace, tmp_path):
    path = make_adapter(workspace, tmp_path, Embeddings.new_rows)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["trainable_token_indices"] = {"embed_tokens": [7, 8], "lm_head": [7, 8]}
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"trains 2 rows of the embeddings, from row 7, .* extended by 48 others"):
        continued(workspace, tmp_path, path)


DAMAGES = {
    "not JSON": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "no object": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "no rank": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "a rank of words": lambda folder: (folder / "adapter_config.json").write_text('{"r": "x", "lora_alpha": 1}'),
    "cut weights": lambda folder: (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 9_999_999)),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
    "bytes": lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_described_in_one_sentence(damage, workspace, tmp_path):
    path = make_adapter(workspace, tmp_path)
    DAMAGES[damage](tmp_path / "adapter")
    with pytest.raises(ModelError, match="is damaged"):
        read_fixed(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"has no adapter_config\.json; give the adapter/ folder"):
        continued(workspace, tmp_path, path)


def test_the_planner_refuses_what_the_run_would(workspace, tmp_path):
    path = make_adapter(workspace, tmp_path)
    overrides = (*SMALL, "stage=sft", "lora.rank=8", f"model.path={path}", f"stage.init_adapter={tmp_path / 'adapter'}")
    done = run_verb(workspace, "plan", *overrides, expect=2)
    assert "type lora.rank=4" in done.stderr
