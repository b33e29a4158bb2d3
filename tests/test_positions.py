"""Scaled positions: a run sets them, its adapter's card tells of them, and all that comes of it computes with them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from cqlora.base import ADAPTER_WEIGHTS, read_base, read_card
from cqlora.config.choices import ModelFormat, RopeScaling
from cqlora.config.run_yaml import load_run_yaml
from cqlora.data.cache import prepare_cache
from cqlora.data.order import StepOrder
from cqlora.engine import LlamaEngine
from cqlora.errors import ConfigError, ModelError
from cqlora.evaluation.models import ModelChoice
from cqlora.launch.settle import look_ahead
from cqlora.positions import POSITIONS, read_rope, scale_as_trained, scale_positions
from tests.cards import change_card
from tests.kinds import write_kind
from tests.runs import finish_run, losses, typed_run
from tests.train.test_trainer import stock_losses
from tests.weights.adapters import attach, load, logits
from tests.weights.test_merge import edit, merge

FACTOR = 4.0
RUN = ("stage=pretrain", "model=auto", "lora.dropout=0", "stage.max_steps=2", "stage.sequence_length=512",
       "stage.learning_rate=1e-2", "model.quantization=none", f"model.rope_factor={FACTOR:g}")  # fmt: skip
IDS = torch.randint(4, 320, (1, 600), generator=torch.Generator().manual_seed(0))
"""More than twice the positions that the base was made for."""
EXPECTED = {
    "linear": {"rope_type": "linear", "factor": FACTOR},
    "yarn": {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": 256},
    "llama3": {"rope_type": "llama3", "factor": FACTOR, "original_max_position_embeddings": 256,
               "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}  # fmt: skip
"""What each scaling is in transformers' words."""


def scale_by_hand(base: Path, scaling: str, folder: Path) -> Path:
    """A copy of a base whose config.json says the scaling, for transformers."""
    theta = {"rope_theta": read_rope(read_base(base).config)["rope_theta"]}
    shutil.copytree(base, folder)
    edit(folder / "config.json", rope_parameters=theta | EXPECTED[scaling], max_position_embeddings=int(256 * FACTOR))
    return folder


@pytest.fixture(scope="module", params=EXPECTED)
def trained(request, workspace, tmp_path_factory) -> tuple[str, Path, Path]:
    """A scaling, a base and the folder of a run that set it."""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_kind("llama", folder / "base")
    config = typed_run(workspace, *RUN, f"model.path={base}", f"model.rope_scaling={request.param}")
    assert finish_run(config, folder / "run") == 0
    return request.param, base, folder / "run"


def test_the_run_trains_transformers_model_with_scaled_positions(trained, tmp_path):
    scaling, base, run = trained
    config = load_run_yaml(run / "run.yaml")
    cache = prepare_cache(config, read_base(base))
    packs = StepOrder(len(cache.splits["train"]), config.stage.global_batch_size, config.seed).packs_of_step(0)
    summed, labels = stock_losses(
        scale_by_hand(base, scaling, tmp_path / "scaled"), [cache.splits["train"].pack(pack) for pack in packs]
    )
    assert losses(run)[0][1] == pytest.approx(summed / labels, rel=1e-5)


def test_adapter_engine_and_merged_folder_compute_what_transformers_does(trained, tmp_path):
    scaling, base, run = trained
    adapter = run / "adapter"
    assert read_card(adapter)[POSITIONS] == {"rope_scaling": scaling, "rope_factor": FACTOR}
    scaled = scale_by_hand(base, scaling, tmp_path / "scaled")
    expected = logits(attach(load(scaled), adapter), IDS)
    size = float(expected.std())
    assert (logits(load(scaled), IDS) - expected).abs().max() > 0.01 * size, "the adapter matters"
    assert (logits(attach(load(base), adapter), IDS) - expected).abs().max() > 0.1 * size

    merged = merge(base, [adapter], tmp_path / "merged")
    config = read_base(merged).config
    assert {key: value for key, value in read_rope(config).items() if key != "rope_theta"} == EXPECTED[scaling]
    assert config["max_position_embeddings"] == 256 * FACTOR
    torch.testing.assert_close(logits(load(merged), IDS), expected, atol=1e-4 * size, rtol=1e-3)
    for engine in (
        LlamaEngine(adapter, base, dtype="float32"), LlamaEngine(merged, "", use_lora=False, dtype="float32")
    ):  # fmt: skip
        assert engine.max_length == 256 * FACTOR
        found = engine._decoder.all_logits(IDS[0].tolist())
        torch.testing.assert_close(found, expected, atol=1e-4 * size, rtol=1e-3)
    assert ModelChoice("adapted", base, adapter).count_positions() == 256 * FACTOR


def test_a_gguf_file_says_the_scaling_under_llama_cpps_keys(trained, tmp_path):
    scaling, base, run = trained
    read = GGUFReader(merge(base, [run / "adapter"], tmp_path / "g", format=ModelFormat.gguf) / "g.f16.gguf")
    said = {name: field.contents() for name, field in read.fields.items() if name.startswith("llama.rope.scaling")}
    assert read.fields["llama.context_length"].contents() == 256 * FACTOR
    names = [tensor.name for tensor in read.tensors]
    if scaling == "llama3":
        assert not said and "rope_freqs.weight" in names
        return
    expected = {"llama.rope.scaling.type": scaling, "llama.rope.scaling.factor": FACTOR}
    expected |= {"llama.rope.scaling.original_context_length": 256} if scaling == "yarn" else {}
    assert said == expected and "rope_freqs.weight" not in names


def test_the_adapter_is_trained_on_with_its_own_scaling_only(trained, workspace):
    scaling, base, run = trained
    on = ("stage=pretrain", "model=auto", f"model.path={base}", f"stage.init_adapter={run / 'adapter'}",
          "stage.sequence_length=128", "model.quantization=none")  # fmt: skip
    with pytest.raises(ConfigError, match=rf"type model.rope_scaling={scaling} model.rope_factor=4 to continue it"):
        typed_run(workspace, *on)
    typed_run(workspace, *on, f"model.rope_scaling={scaling}", "model.rope_factor=4")


def test_a_base_of_scaled_positions_is_refused_another_scaling(workspace, tmp_path):
    base = write_kind("llama", tmp_path / "base", rope_parameters={"rope_theta": 1e4, **EXPECTED["yarn"]})
    run = ("stage=pretrain", "model=auto", f"model.path={base}", "stage.sequence_length=128")
    scaled = (*run, "model.rope_scaling=linear", "model.rope_factor=2")
    with pytest.raises(ModelError, match="scales its positions by yarn already; leave model"):
        typed_run(workspace, *scaled)
    config = typed_run(workspace, *run)
    config.model.rope_scaling, config.model.rope_factor = RopeScaling.linear, 2.0
    with pytest.raises(ModelError, match="by yarn already"):
        look_ahead(config)


@pytest.mark.parametrize(
    "overrides, told",
    [(["model.rope_factor=2"], "model.rope_factor"), (["model.rope_scaling=yarn"], "rope_factor=1 scales no positions"),
     (["model.rope_scaling=yarn", "model.rope_factor=0.5"], "rope_factor=0.5 scales no positions"),
     (["stage.sequence_length=300"], "beyond the 256 positions .* scale them with model.rope_scaling")],
    ids=str,
)  # fmt: skip
def test_a_factor_without_a_scaling_and_a_scaling_without_one_are_refused(overrides, told, workspace, tmp_path):
    base = write_kind("llama", tmp_path / "base")
    with pytest.raises(ConfigError, match=told):
        typed_run(workspace, "stage=pretrain", "model=auto", f"model.path={base}", *overrides)


def test_adapters_of_different_scalings_are_not_merged(trained, tmp_path):
    _, base, run = trained
    other = Path(shutil.copytree(run / "adapter", tmp_path / "other"))
    weights = load_file(other / ADAPTER_WEIGHTS)
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, other / ADAPTER_WEIGHTS)
    change_card(other, **{POSITIONS: {"rope_scaling": "linear", "rope_factor": 7.0}})
    with pytest.raises(ModelError, match="differently scaled positions"):
        merge(base, [run / "adapter", other], tmp_path / "merged")
    change_card(other, **{POSITIONS: {"rope_scaling": "round"}})
    with pytest.raises(ModelError, match=r"cqlora.json has positions that are no scaling"):
        merge(base, [other], tmp_path / "merged")


@pytest.mark.parametrize("scaling", EXPECTED)
@pytest.mark.parametrize("kind", ["qwen3", "smollm3"])
def test_the_engine_computes_every_kind_with_every_scaling(kind, scaling, tmp_path):
    base = write_kind(kind, tmp_path / "base", rope_parameters={"rope_theta": 1e4, **EXPECTED[scaling]})
    found = LlamaEngine(base, "", use_lora=False, dtype="float32")._decoder.all_logits(IDS[0, :250].tolist())
    expected = logits(load(base), IDS[:, :250])
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.std()), rtol=1e-3)


@pytest.mark.parametrize(
    "kind, rope, told",
    [("qwen3", EXPECTED["llama3"], "cannot hold rotary scaling llama3 of a qwen3 model"),
     ("llama", {**EXPECTED["yarn"], "beta_fast": 16.0}, "this model has beta_fast=16.0"),
     ("llama", {"rope_type": "dynamic", "factor": 2.0}, "cannot hold rotary scaling dynamic of a llama model")],
    ids=str,
)  # fmt: skip
def test_a_scaling_that_llama_cpp_does_not_compute_is_refused(kind, rope, told, tmp_path):
    base = write_kind(kind, tmp_path / "base")
    edit(base / "config.json", rope_parameters={"rope_theta": 1e4, **rope})
    with pytest.raises(ModelError, match=f"{told}.*use format=safetensors"):
        merge(base, [], tmp_path / "gguf", format=ModelFormat.gguf)


def test_the_base_keeps_its_spelling():
    old = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": None, "max_position_embeddings": 100}
    new = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
           "max_position_embeddings": 100}  # fmt: skip
    scaled = [scale_positions(config, RopeScaling.yarn, 2.0, Path("base")) for config in (old, new)]
    assert read_rope(scaled[0]) == read_rope(scaled[1]) and "rope_parameters" not in scaled[0]
    assert scaled[0]["rope_theta"] == 5e5 and scaled[0]["max_position_embeddings"] == 200
    assert scale_as_trained(old, [({}, Path("card"))], Path("base")) is old
    json.dumps(scaled)
