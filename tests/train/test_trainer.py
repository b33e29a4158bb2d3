"""The step loop against independent computations: the stock model's loss, a closed form, another split of the batch."""

import functools
import json
import math
import operator
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cqlora.base import read_base, read_card
from cqlora.config.schema import PretrainConfig
from cqlora.data.cache import prepare_cache
from cqlora.data.order import StepOrder, share_among_ranks
from cqlora.launch.start import read_final_loss
from cqlora.system.metrics import append_metrics, name_values, read_metrics
from cqlora.train.optimizer import learning_rate_share
from cqlora.train.trainer import Trainer
from tests.runs import adapter_sha256, evaluations, events, extend_tiny, finish_run, losses, typed_run

PLAIN = ("stage=pretrain", "lora.dropout=0", "model.quantization=none", "stage.max_steps=4")


def stock_losses(folder, packs):
    """Summed token losses and label tokens of packs, each document run alone through the stock model and loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    summed_loss, labels = 0.0, 0
    for pack in packs:
        for tokens, mask in split_documents(pack):
            with torch.no_grad():
                logits = model(input_ids=tokens[None]).logits[0, :-1]
            taken = mask[1:]
            token_losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            summed_loss += float(token_losses[taken].double().sum())
            labels += int(taken.sum())
    return summed_loss, labels


def split_documents(pack):
    ends = np.cumsum(pack.document_lengths)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield torch.from_numpy(pack.token_ids[start:end]), torch.from_numpy(pack.label_mask[start:end])


def test_the_first_step_records_the_stock_loss_over_the_label_tokens_of_the_global_batch(workspace, tmp_path):
    config = typed_run(workspace, *PLAIN, "stage.global_batch_size=4")
    assert finish_run(config, tmp_path) == 0
    cache = prepare_cache(config, read_base(config.model.path))
    order = StepOrder(len(cache.splits["train"]), 4, config.seed)
    summed_loss, labels = stock_losses(
        config.model.path, [cache.splits["train"].pack(pack) for pack in order.packs_of_step(0)]
    )
    assert losses(tmp_path)[0][1] == pytest.approx(summed_loss / labels, rel=1e-5)


def test_evaluation_is_token_weighted_and_its_bits_per_character_are_those_of_the_documents(workspace, tmp_path):
    config = typed_run(workspace, *PLAIN, "stage.eval_tokens=0", "stage.max_steps=1")
    assert finish_run(config, tmp_path) == 0
    first = {row["source"]: row for row in evaluations(tmp_path) if row["step"] == 0}
    cache = prepare_cache(config, read_base(config.model.path))
    assert {source.name for source in cache.sources} == set(first) == {"sample_zh", "sample_en"}
    for source_id, source in enumerate(cache.sources):
        packs = cache.splits["val"].packs_of(source_id, 0)
        summed_loss, labels = stock_losses(config.model.path, packs)
        row = first[source.name]
        assert (row["language"], row["tokens"]) == (source.language, labels)
        assert row["loss"] == pytest.approx(summed_loss / labels, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(summed_loss / labels), rel=1e-4)
        characters = sum(sum(pack.characters) for pack in packs)
        assert row["bits_per_character"] == pytest.approx(summed_loss / math.log(2) / characters, rel=1e-5)
        assert row["bits_per_byte"] <= row["bits_per_character"]


def test_accumulation_changes_nothing_but_rounding(workspace, tmp_path):
    split = ("stage.global_batch_size=4", "hardware.micro_batch_size=1")
    whole = ("stage.global_batch_size=4", "hardware.micro_batch_size=4")
    for name, batch in (("split", split), ("whole", whole)):
        assert finish_run(typed_run(workspace, *PLAIN, *batch), tmp_path / name) == 0
    for (_, one), (_, other) in zip(losses(tmp_path / "split"), losses(tmp_path / "whole"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("split", "whole")]
    for name, tensor in weights[0].items():
        # Adam divides by gradients near zero, which magnifies rounding to a share of the learning rate.
        torch.testing.assert_close(tensor, weights[1][name], atol=2e-5, rtol=1e-3)


def test_an_epoch_visits_every_pack_once_and_its_tail_does_not_leak():
    order = StepOrder(packs=11, global_batch_size=4, seed=7)
    assert order.steps_per_epoch == 3 and order.count_steps(2) == 6 and order.count_steps(1.5) == 5
    # 1.1 passes of ten steps are eleven, though 1.1 is a little more than that in binary.
    assert StepOrder(packs=40, global_batch_size=4, seed=7).count_steps(1.1) == 11
    assert all(StepOrder(1000, 1, 7).count_steps(hundredths / 100) == 10 * hundredths for hundredths in range(1, 500))
    first = [order.packs_of_step(step) for step in range(3)]
    second = [order.packs_of_step(step) for step in range(3, 6)]
    assert [len(packs) for packs in first] == [4, 4, 3]
    assert (
        sorted(functools.reduce(operator.iadd, first, []))
        == sorted(functools.reduce(operator.iadd, second, []))
        == list(range(11))
    )
    assert first != second
    assert StepOrder(packs=11, global_batch_size=4, seed=8).packs_of_step(0) != first[0]


@pytest.mark.parametrize("packs", [8, 7, 5, 1])
def test_every_rank_has_as_many_passes_and_every_pack_is_taken_once(packs):
    shares = [share_among_ranks(list(range(packs)), rank, 3, 2) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    taken = [pack for share in shares for micro in share for pack in micro]
    assert sorted(taken) == list(range(packs))
    assert all(len(micro) <= 2 for share in shares for micro in share)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warm_up_counts_optimizer_steps_whatever_the_accumulation_and_reaches_the_peak(schedule, workspace, tmp_path):
    overrides = (
        "stage.max_steps=5",
        "stage.warmup_steps=2",
        f"stage.schedule={schedule}",
        "stage.learning_rate=1e-3",
    )
    config = typed_run(workspace, *PLAIN, *overrides, "stage.global_batch_size=2")
    assert finish_run(config, tmp_path) == 0
    rates = [row["learning_rate"] for row in read_metrics(tmp_path) if row["kind"] == "train"]
    middle = {"constant": 1.0, "cosine": 0.1 + 0.9 * 0.5, "linear": 0.1 + 0.9 * 0.5}[schedule]
    last = 1.0 if schedule == "constant" else 0.1
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, middle * 1e-3, last * 1e-3])


def test_a_schedule_without_warm_up_starts_at_the_peak():
    stage = PretrainConfig(name="pretrain", sequence_length=64, global_batch_size=1, warmup_steps=0)
    assert learning_rate_share(stage, 0, 10) == 1.0
    assert learning_rate_share(stage, 9, 10) == pytest.approx(stage.min_learning_rate_ratio)


def test_weight_decay_is_what_was_configured(workspace, tmp_path):
    """With weight decay w and rate r, decoupled decay shrinks a matrix without gradient by 1 - r·w a step."""
    for name, decay in (("none", 0.0), ("some", 0.5)):
        config = typed_run(workspace, *PLAIN, "stage.max_steps=1", f"stage.weight_decay={decay}",
                           "stage.warmup_steps=0", "stage.learning_rate=0.1")  # fmt: skip
        assert finish_run(config, tmp_path / name) == 0
    plain, decayed = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("none", "some"))
    # At the first step B is zero, so A has no gradient and Adam leaves it where it was.
    for name in (name for name in plain if "lora_A" in name):
        torch.testing.assert_close(decayed[name], plain[name] * (1 - 0.1 * 0.5))


def test_sft_trains_and_continues_a_pretraining_adapter_whose_lineage_its_card_tells(workspace, tmp_path):
    assert finish_run(typed_run(workspace, *PLAIN), tmp_path / "pretrain") == 0
    adapter = tmp_path / "pretrain" / "adapter"
    config = typed_run(workspace, "stage=sft", "stage.max_steps=2", "model.quantization=none",
                       "stage.system_prompt='Be brief.'",
                       f"stage.init_adapter={adapter}")  # fmt: skip
    assert finish_run(config, tmp_path / "sft") == 0
    assert {row["source"] for row in evaluations(tmp_path / "sft")} == {"sample_dialog"}
    card = json.loads((tmp_path / "sft" / "adapter" / "cqlora.json").read_text())
    assert card["system_prompt"] == "Be brief."
    assert adapter_sha256(tmp_path / "sft") != adapter_sha256(tmp_path / "pretrain")
    more = typed_run(workspace, "stage=sft", "stage.max_steps=1", "model.quantization=none",
                     f"stage.init_adapter={tmp_path / 'sft' / 'adapter'}")  # fmt: skip
    assert finish_run(more, tmp_path / "more") == 0
    cards = [read_card(tmp_path / name / "adapter") for name in ("pretrain", "sft", "more")]
    first, second = (adapter_sha256(tmp_path / name) for name in ("pretrain", "sft"))
    assert [card["lineage"] for card in cards] == [
        [],
        [{"adapter_sha256": first, "how": "continued"}],
        [{"adapter_sha256": first, "how": "continued"}, {"adapter_sha256": second, "how": "continued"}],
    ]
    assert cards[0]["init_adapter"] is None
    assert cards[1]["init_adapter"] == {"path": str(adapter), "adapter_sha256": first}


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_on_an_extended_base_trains_its_added_rows_and_resumes_exactly(tied, workspace, tmp_path):
    extended = extend_tiny(workspace, tmp_path, tied)
    overrides = (f"model.path={extended}", f"model.tie_word_embeddings={tied}", "stage.checkpoint_every_steps=2")
    config = typed_run(workspace, "stage=pretrain", "stage.max_steps=4", *overrides)
    assert finish_run(config, tmp_path / "whole") == 0
    state = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    assert [tensor.shape for name, tensor in state.items() if "lora" not in name] == [(48, 64)] * (1 if tied else 2)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000004")
    assert finish_run(config, tmp_path / "resumed") == 0
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert adapter_sha256(tmp_path / "resumed") == adapter_sha256(tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw"])
def test_every_optimizer_of_a_cpu_trains_and_resumes_exactly(optimizer, workspace, tmp_path):
    config = typed_run(workspace, *PLAIN, f"stage.optimizer={optimizer}", "stage.checkpoint_every_steps=2")
    assert finish_run(config, tmp_path / "whole") == 0
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole" / "checkpoints").rename(tmp_path / "resumed" / "checkpoints")
    last = tmp_path / "resumed" / "checkpoints" / "step-00000004"
    last.rename(tmp_path / "aside")
    assert finish_run(config, tmp_path / "resumed") == 0
    assert events(tmp_path / "resumed")[0] == "resumed"
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[2:]
    assert adapter_sha256(tmp_path / "resumed") == adapter_sha256(tmp_path / "whole")


CHINESE = "第{}天，我们沿着长江往上游走，看见两岸的山一座比一座高，船夫说再走三十里就到渡口了。"
ENGLISH = "On day {} we walked up the river, and the hills on both banks rose one above the other before us."


def write_texts(folder, *templates):
    """Plain text files, thirty of each template: a source without a split of its own."""
    folder.mkdir()
    for number in range(30):
        for kind, template in enumerate(templates):
            (folder / f"{number:02}-{kind}.txt").write_text(template.format(number) * 3, encoding="utf-8")
    return ("data=text", f"data.sources.text.path={folder}")


def test_losses_of_a_source_in_two_languages_are_reported_apart(workspace, tmp_path):
    source = write_texts(tmp_path / "texts", CHINESE, ENGLISH)
    batch = ("stage.max_steps=1", "stage.global_batch_size=64", "stage.eval_tokens=0", "data.val_fraction=0.3")
    config = typed_run(workspace, *PLAIN, *source, *batch)
    assert finish_run(config, tmp_path / "run") == 0
    cache = prepare_cache(config, read_base(config.model.path))
    assert {(group.name, group.language) for group in cache.sources} == {("text", "zh"), ("text", "en")}
    step = next(row for row in read_metrics(tmp_path / "run") if row["kind"] == "train")
    for group_id, group in enumerate(cache.sources):
        summed_loss, labels = stock_losses(config.model.path, cache.splits["train"].packs_of(group_id, 0))
        assert step[f"loss/text/{group.language}"] == pytest.approx(summed_loss / labels, rel=1e-4)
    first = [row for row in evaluations(tmp_path / "run") if row["step"] == 0]
    named = [name_values(row) for row in first]
    assert {row["language"] for row in first} == {"zh", "en"}
    assert not named[0].keys() & named[1].keys()
    assert {name for values in named for name in values} >= {"eval/text/zh/loss", "eval/text/en/loss"}


def tell_block_forwards() -> None:
    """Print how many times a block's attention ran forward with gradients, recomputations among them."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward, fit, calls = LlamaAttention.forward, Trainer.fit, []

    def count(self, *arguments, **options):
        calls.extend([1] * torch.is_grad_enabled())
        return forward(self, *arguments, **options)

    def fit_and_tell(self) -> None:
        fit(self)
        print(f"block forwards {len(calls)}", file=sys.stderr, flush=True)

    LlamaAttention.forward, Trainer.fit = count, fit_and_tell


@pytest.mark.parametrize("evaluated", [True, False], ids=["evaluated", "without validation text"])
def test_activations_are_recomputed_in_a_fresh_run_and_in_a_resumed_one(evaluated, workspace, tmp_path):
    source = write_texts(tmp_path / "texts", CHINESE)
    steps, layers, packs = 4, 2, 2
    overrides = (*source, f"data.val_fraction={0.3 if evaluated else 0}", f"stage.global_batch_size={packs}",
                 "stage.sequence_length=64", "stage.checkpoint_every_steps=2", "hardware.activation_checkpointing=full",
                 "stage.eval_every_steps=3")  # fmt: skip
    config = typed_run(workspace, *PLAIN, f"stage.max_steps={steps}", *overrides)
    folder = tmp_path / "run"
    assert finish_run(config, folder, tell_block_forwards) == 0
    assert bool(evaluations(folder)) == evaluated
    shutil.rmtree(folder / "checkpoints" / f"step-{steps:08d}")
    assert finish_run(config, folder, tell_block_forwards) == 0
    assert "resumed" in events(folder)
    lines = re.findall(r"block forwards (\d+)", (folder / "stderr.txt").read_text())
    # Each block runs once forward and once more in the backward pass.
    assert [int(count) for count in lines] == [2 * layers * packs * steps, 2 * layers * packs * (steps - 2)]


def plant_nan_in_every_step() -> None:
    original = torch.nn.utils.clip_grad_norm_

    def clip(parameters, *arguments, **options):
        parameters[0].grad.view(-1)[0] = float("nan")
        return original(parameters, *arguments, **options)

    torch.nn.utils.clip_grad_norm_ = clip


def test_a_run_none_of_whose_steps_was_finite_is_an_error_and_leaves_no_adapter(workspace, tmp_path):
    config = typed_run(workspace, *PLAIN, "stage.max_steps=2", "stage.max_bad_steps=3")
    assert finish_run(config, tmp_path, plant_nan_in_every_step) == 1
    assert "none of the 2 steps was finite" in (tmp_path / "stderr.txt").read_text()
    assert events(tmp_path) == ["skipped_step", "skipped_step"]
    assert not (tmp_path / "adapter").exists() and not list(tmp_path.glob("checkpoints/step-*"))


def test_a_final_loss_that_is_not_finite_is_read_as_such(tmp_path):
    append_metrics(
        tmp_path, {"kind": "eval", "step": 2, "source": "a", "language": "zh", "loss": math.nan, "tokens": 3}
    )
    append_metrics(tmp_path, {"kind": "eval", "step": 2, "source": "a", "language": "en", "loss": 1.0, "tokens": 5})
    assert math.isnan(read_final_loss(tmp_path))
