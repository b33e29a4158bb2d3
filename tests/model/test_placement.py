"""Where a model's parts go: what a worker may hold, and which GPU takes which blocks."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cqlora.config.choices import Strategy
from cqlora.config.schema import HardwareConfig
from cqlora.errors import ModelError
from cqlora.model.load import device_map
from cqlora.model.placement import check_share
from tests.runs import build_base, typed_run

CPU = torch.device("cpu")


def test_weights_that_stay_whole_are_an_error_not_a_warning():
    check_share(0.25, 4)
    check_share(0.27, 4)
    with pytest.raises(ModelError, match=r"left 87% of the weights on one of 4 workers; use hardware\.strategy=ddp"):
        check_share(0.87, 4)


def spread(workspace, gpus: int, blocks: int, tied: bool = False) -> dict[str, int]:
    config = typed_run(workspace, "stage=pretrain", f"model.num_hidden_layers={blocks}").model
    config.tie_word_embeddings = tied
    hardware = HardwareConfig(name="own", strategy=Strategy.layers, gpus_per_node=gpus)
    return {name: device.index for name, device in device_map(config, hardware, CPU).items()}


@pytest.mark.parametrize("gpus, blocks", [(1, 4), (2, 4), (3, 80), (4, 7)])
def test_layers_are_spread_evenly_and_in_order(gpus, blocks, workspace):
    devices = spread(workspace, gpus, blocks)
    order = [devices[f"model.layers.{block}"] for block in range(blocks)]
    assert order == sorted(order) and set(order) == set(range(gpus))
    counts = [order.count(gpu) for gpu in range(gpus)]
    assert max(counts) - min(counts) <= 1
    assert devices["model.embed_tokens"] == 0
    assert devices["model.norm"] == devices["lm_head"] == gpus - 1


def test_a_tied_head_stays_with_the_embedding(workspace):
    assert spread(workspace, 2, 4, tied=True)["lm_head"] == 0


def test_the_map_names_every_weight_of_the_model(workspace, tmp_path):
    devices = spread(workspace, 2, 4)
    config = AutoConfig.from_pretrained(build_base(workspace, tmp_path / "base", False))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        assert sum(name.startswith(part + ".") for part in devices) == 1, name


def test_elsewhere_everything_is_on_the_workers_own_device(workspace):
    config = typed_run(workspace, "stage=pretrain")
    assert device_map(config.model, config.hardware, CPU) == {"": CPU}
