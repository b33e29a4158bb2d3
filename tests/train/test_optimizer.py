"""Learning rates of steps and of parameters against closed forms and PEFT's own LoRA+."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

from cqlora.config.choices import Embeddings, Schedule
from cqlora.config.schema import LoraConfig, PretrainConfig
from cqlora.errors import ConfigError
from cqlora.model.adapters import attach_adapter
from cqlora.model.load import load_base
from cqlora.random_base import open_base
from cqlora.system.metrics import read_metrics
from cqlora.train.optimizer import build_optimizer, learning_rate_share
from tests.runs import adapter_sha256, evaluations, events, extend_tiny, finish_run, losses, typed_run

RUN = ("stage=pretrain", "model.quantization=none", "lora.dropout=0")


def wsd(**settings) -> PretrainConfig:
    return PretrainConfig(name="pretrain", sequence_length=64, global_batch_size=1, schedule=Schedule.wsd, **settings)


def test_wsd_warms_up_stays_and_falls_by_one_less_the_root_of_what_is_done():
    stage = wsd(warmup_steps=2, decay_fraction=0.4, min_learning_rate_ratio=0.0)
    shares = [learning_rate_share(stage, step, 10) for step in range(10)]
    assert shares == pytest.approx([0.5, 1, 1, 1, 1, 1, *(1 - math.sqrt(done / 4) for done in (1, 2, 3, 4))])


def test_wsd_ends_at_its_floor_whatever_the_shares_round_to():
    for total in range(2, 40):
        for fraction in (0.001, 0.1, 0.5, 1.0):
            for warmup in (0, 1, total - 1):
                stage = wsd(warmup_steps=warmup, decay_fraction=fraction, min_learning_rate_ratio=0.3)
                shares = [learning_rate_share(stage, step, total) for step in range(total)]
                assert shares[-1] == pytest.approx(0.3) and max(shares) <= 1
                assert all(one >= other for one, other in zip(shares[warmup:], shares[warmup + 1 :], strict=False))


def test_before_its_decay_wsd_does_not_depend_on_how_long_the_run_is():
    stage = wsd(warmup_steps=3, decay_fraction=0.2)
    short, long = ([learning_rate_share(stage, step, total) for step in range(40)] for total in (50, 500))
    assert short == long


def test_each_parameter_has_the_rate_that_pefts_lora_plus_gives_it(workspace):
    config = typed_run(workspace, *RUN)
    base = open_base(config.model)
    model = load_base(base, config.model, config.hardware, torch.device("cpu"), torch.float32)
    model = attach_adapter(model, base, LoraConfig(rank=4), Embeddings.frozen, "")
    ours = build_optimizer(model, replace(config.stage, learning_rate=3e-4), 8)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=3e-4, loraplus_lr_ratio=8)
    rates = [
        {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
        for optimizer in (ours, theirs)
    ]
    assert rates[0] == pytest.approx(rates[1]) and len(set(rates[0].values())) == 2


def test_the_first_step_moves_b_by_the_ratio_times_the_learning_rate_and_rows_by_their_own(workspace, tmp_path):
    """Adam's first step is the rate times the gradient's sign; A has no gradient while B is zero."""
    extended = extend_tiny(workspace, tmp_path, True)
    rates = ("stage.learning_rate=1e-3", "stage.embeddings_learning_rate=4e-3", "lora.b_learning_rate_ratio=16")
    shape = (f"model.path={extended}", "model.tie_word_embeddings=true", "stage.max_steps=1", "stage.warmup_steps=0")
    assert finish_run(typed_run(workspace, *RUN, *rates, *shape), tmp_path / "run") == 0
    state = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    moved = max(float(tensor.abs().max()) for name, tensor in state.items() if "lora_B" in name)
    assert moved == pytest.approx(16e-3, rel=1e-3)
    from safetensors import safe_open

    with safe_open(extended / "model.safetensors", framework="pt") as weights:
        rows = weights.get_tensor("model.embed_tokens.weight")[2000:].float()
    (trained,) = (tensor for name, tensor in state.items() if "token" in name)
    assert float((trained - rows).abs().max()) == pytest.approx(4e-3, rel=1e-2)


@pytest.mark.parametrize(
    "lever",
    [
        ("lora.b_learning_rate_ratio=16",),
        ("stage.neftune_alpha=5",),
        ("stage.schedule=wsd", "stage.decay_fraction=0.5"),
    ],
    ids=lambda lever: lever[0],
)
def test_with_each_lever_a_resumed_run_is_the_one_that_never_stopped_and_no_other(lever, workspace, tmp_path):
    short = ("stage.max_steps=4", "stage.checkpoint_every_steps=2", "stage.eval_every_steps=2")
    config = typed_run(workspace, *RUN, *short, *lever)
    assert finish_run(config, tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000004")
    assert finish_run(config, tmp_path / "resumed") == 0
    assert "resumed" in events(tmp_path / "resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert adapter_sha256(tmp_path / "resumed") == adapter_sha256(tmp_path / "whole")
    assert finish_run(typed_run(workspace, *RUN, *short), tmp_path / "resumed") == 1
    assert f"{lever[0].partition('=')[0]} was" in (tmp_path / "resumed" / "stderr.txt").read_text()


def test_noise_changes_training_and_no_evaluation(workspace, tmp_path):
    for name, alpha in (("plain", 0), ("noisy", 5)):
        config = typed_run(workspace, *RUN, "stage.max_steps=1", f"stage.neftune_alpha={alpha}")
        assert finish_run(config, tmp_path / name) == 0
    first = [[row["loss"] for row in evaluations(tmp_path / name) if row["step"] == 0] for name in ("plain", "noisy")]
    assert first[0] == first[1]
    trained = [losses(tmp_path / name)[0][1] for name in ("plain", "noisy")]
    assert trained[0] != trained[1] and trained[0] == pytest.approx(trained[1], rel=0.05)


@pytest.mark.parametrize(
    "overrides, told",
    [
        (("stage.decay_fraction=0.1",), "stage.decay_fraction=0.1 has no effect without stage.schedule=wsd"),
        (("stage.schedule=wsd", "stage.decay_fraction=0"), "stage.decay_fraction=0.0 must be above 0"),
        (("lora.b_learning_rate_ratio=0",), "lora.b_learning_rate_ratio=0.0 must be above 0"),
        (("stage.neftune_alpha=-1",), "stage.neftune_alpha=-1.0 is out of range"),
        (
            ("lora.rank=16", "lora.method=none", "lora.b_learning_rate_ratio=4"),
            "lora.b_learning_rate_ratio=4.0 has no effect",
        ),
        (("lora.method=none",), "lora.rank=4 has no effect without low-rank matrices"),
        (("lora.rank=16", "lora.method=none"), "trains nothing"),
        (("lora.rank=16", "lora.method=none", "stage.embeddings=lora"), "stage.embeddings=lora"),
    ],
)
def test_a_lever_without_effect_or_out_of_range_is_refused(overrides, told, workspace):
    with pytest.raises(ConfigError) as caught:
        typed_run(workspace, *RUN, *overrides)
    assert told in str(caught.value)


def test_the_recorded_rate_is_the_low_rank_matrices_own(workspace, tmp_path):
    config = typed_run(workspace, *RUN, "stage.max_steps=5", "stage.schedule=wsd", "stage.decay_fraction=0.4",
                       "stage.warmup_steps=1", "stage.learning_rate=1e-3")  # fmt: skip
    assert finish_run(config, tmp_path) == 0
    rates = [row["learning_rate"] for row in read_metrics(tmp_path) if row["kind"] == "train"]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3 * (0.1 + 0.9 * (1 - math.sqrt(0.5))), 1e-4])
