"""New rows alone, then low-rank matrices beside them: two runs in a row are one adapter."""

import shutil

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cqlora.base import read_card
from cqlora.system.metrics import read_metrics
from tests.conftest import run_verb
from tests.runs import adapter_sha256, evaluations, extend_tiny, finish_run, losses, typed_run

NONE = ("stage=pretrain", "lora.method=none", "lora.rank=16", "lora.dropout=0", "model.quantization=none")
RUN = ("stage.max_steps=4", "stage.checkpoint_every_steps=2", "stage.learning_rate=1e-2", "stage.eval_tokens=0")


def last_losses(folder):
    rows = evaluations(folder)
    return {row["source"]: row["loss"] for row in rows if row["step"] == rows[-1]["step"]}


def first_losses(folder):
    return {row["source"]: row["loss"] for row in evaluations(folder) if row["step"] == 0}


def test_rows_alone_then_all_is_one_adapter_that_merges_as_plain_peft_does(workspace, tmp_path):
    extended = extend_tiny(workspace, tmp_path, False)
    base = (f"model.path={extended}", *RUN)
    rows, both = tmp_path / "rows", tmp_path / "both"
    assert finish_run(typed_run(workspace, *NONE, *base), rows) == 0
    state = load_file(rows / "adapter" / "adapter_model.safetensors")
    assert [tuple(tensor.shape) for tensor in state.values()] == [(48, 64)] * 2
    assert losses(rows)[-1][1] < losses(rows)[0][1]

    # Interrupted and resumed it is the same run.
    shutil.copytree(rows, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000004")
    assert finish_run(typed_run(workspace, *NONE, *base), tmp_path / "resumed") == 0
    assert adapter_sha256(tmp_path / "resumed") == adapter_sha256(rows)

    # The second run begins where the first ended, since B is zero, and holds it.
    then = ("stage=pretrain", "lora.dropout=0", "model.quantization=none", f"stage.init_adapter={rows / 'adapter'}")
    assert finish_run(typed_run(workspace, *then, *base), both) == 0
    assert first_losses(both) == last_losses(rows)
    assert read_card(both / "adapter")["lineage"] == [{"adapter_sha256": adapter_sha256(rows), "how": "continued"}]
    trained = load_file(both / "adapter" / "adapter_model.safetensors")
    assert {"lora_A", "lora_B", "trainable_tokens_delta"} <= {part for name in trained for part in name.split(".")}
    assert all(not torch.equal(trained[name], state[name]) for name in state)

    assert_merges_as_peft(tmp_path, extended, rows / "adapter")
    assert_merges_as_peft(tmp_path, extended, both / "adapter")
    told = run_verb(tmp_path, "merge", f"base={extended}", f"adapter=[{rows / 'adapter'},{both / 'adapter'}]",
                    "output_dir=twice", expect=1).stderr  # fmt: skip
    assert "was continued from" in told


def assert_merges_as_peft(folder, base, adapter):
    """A merged folder's logits are those of plain PEFT's model."""
    merged = folder / f"merged-{adapter.parent.name}"
    run_verb(folder, "merge", f"base={base}", f"adapter={adapter}", f"output_dir={merged}")
    tokens = torch.tensor([[1, 2047, 17, 2000, 300, 2011]])
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(tokens).logits
        stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(stock, adapter)(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    assert float((ours - theirs).norm()) < 0.05 * float((theirs - plain).norm())


def test_every_parameter_that_trains_is_a_row_and_the_plan_counts_no_other(workspace, tmp_path):
    from cqlora.plan.estimate import trainable_parameters
    from cqlora.plan.workload import Rows, describe_run

    extended = extend_tiny(workspace, tmp_path, True)
    config = typed_run(workspace, *NONE, *RUN, f"model.path={extended}", "model.tie_word_embeddings=true")
    assert trainable_parameters(describe_run(config, Rows(2048, 48))) == 48 * 64
    assert finish_run(config, tmp_path / "run") == 0
    state = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "trainable-rank0.safetensors")
    assert sum(tensor.numel() for tensor in state.values()) == 48 * 64
    assert [row["step"] for row in read_metrics(tmp_path / "run") if row["kind"] == "train"] == [1, 2, 3, 4]
