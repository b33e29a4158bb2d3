"""The comparison on a GPU as far as it goes without one: commands, what is missing, rows, operations, arithmetic."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from transformers import PreTrainedTokenizerFast

from benchmarks import gpu
from cqlora.config.choices import Checkpointing, Kernels
from cqlora.config.diagnosis import to_schema
from cqlora.config.schema import CONFIG_DIR, RunConfig, register_schemas
from cqlora.random_base import open_base
from tests.runs import typed_run


@pytest.fixture
def task(workspace, tmp_path) -> gpu.Task:
    base = open_base(typed_run(workspace, "stage=pretrain").model)
    return gpu.Task(base.path, tmp_path / "rows.jsonl", tmp_path, length=64, packs=2, rank=8, checkpointing=False)


def dry_run(task: gpu.Task, *more: str) -> int:
    return gpu.main(["--model", str(task.model), "--folder", str(task.folder), "--rank=8", "--dry-run", *more])


def install(folder: Path, name: str) -> Path:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text("")
    return folder / "bin"


def test_a_dry_run_prints_each_command_and_says_what_is_missing(task, tmp_path, capsys):
    there = install(tmp_path, "llamafactory-cli")
    code = dry_run(task, "--llamafactory", str(there), "--trl", str(there), "--unsloth", str(tmp_path / "nowhere"))
    told = capsys.readouterr().out
    assert code == 3
    commands = dict(zip(*[iter(told.splitlines()[:12])] * 2, strict=True))
    assert list(commands) == [
        "# cqlora", "# cqlora, plain", "# LLaMA-Factory", "# LLaMA-Factory, Liger", "# TRL, Liger", "# unsloth"
    ]  # fmt: skip
    assert "TRL, Liger: " in told and "pip install trl" in told and "pip install unsloth" in told
    assert "LLaMA-Factory: " not in told
    assert dry_run(task, "--llamafactory", str(there)) == 0


def test_every_program_is_told_the_same_model_rows_packs_rank_and_steps(task, tmp_path):
    for liger in (False, True):
        written = yaml.safe_load(Path(gpu.llamafactory(Path("cli"), task, liger)[-1]).read_text())
        assert (written["lora_rank"], written["cutoff_len"], written["enable_liger_kernel"]) == (8, 64, liger)
        assert json.loads((tmp_path / "dataset_info.json").read_text())["rows"]["file_name"] == str(task.rows)
        assert_same_task(written, task)
    written = yaml.safe_load(Path(gpu.trl(Path("trl"), task)[-1]).read_text())
    assert (written["lora_r"], written["max_length"], written["datasets"][0]["data_files"]) == (8, 64, str(task.rows))
    assert_same_task(written, task)
    written = json.loads(Path(gpu.unsloth(Path("python"), task)[-1]).read_text())
    assert (written["rank"], written["length"], written["rows"]) == (8, 64, str(task.rows))
    assert_same_task(written, task)


def assert_same_task(written: dict, task: gpu.Task) -> None:
    assert written["model_name_or_path"] == str(task.model.resolve())
    assert (written["per_device_train_batch_size"], written["max_steps"]) == (task.packs, task.steps)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_our_own_command_is_a_run_of_that_task(kernels, task):
    register_schemas()
    overrides = [each for each in gpu.cqlora(Path("python"), task, kernels)[3:] if not each.startswith("hydra.")]
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        config = to_schema(compose("config", overrides), RunConfig)
    assert config.hardware.kernels is Kernels[kernels]
    assert config.hardware.activation_checkpointing is Checkpointing.none
    assert (config.lora.rank, config.stage.max_steps, config.gradient_accumulation_steps) == (8, gpu.LONG, 1)
    assert config.data.sources["text"].path == str(task.rows)


def test_every_row_fills_a_pack_and_there_are_enough(task):
    gpu.write_rows(task)
    rows = [json.loads(line)["text"] for line in task.rows.read_text().splitlines()]
    assert len(rows) >= gpu.LONG * task.packs
    tokenizer = PreTrainedTokenizerFast.from_pretrained(task.model)
    assert min(len(tokenizer(row)["input_ids"]) for row in rows) >= task.length


def test_operations_of_a_token_grow_with_the_rank_and_not_with_what_is_computed_again(task):
    once = gpu.count_flops_per_token(task)
    assert once == gpu.count_flops_per_token(gpu.replace(task, checkpointing=True))
    assert once < gpu.count_flops_per_token(gpu.replace(task, rank=16))


def test_speed_is_that_of_the_steps_which_the_longer_run_has_more(task, monkeypatch):
    took = {gpu.SHORT: (100.0, 9.0), gpu.LONG: (110.0, 11.5)}
    monkeypatch.setattr(gpu, "run", lambda program, each: took[each.steps])
    speed, memory = gpu.measure(gpu.Program("any", Path("any"), "", gpu.trl), task)
    assert speed == (gpu.LONG - gpu.SHORT) * 2 * 64 / 10.0 and memory == 11.5


def test_a_gpu_that_is_not_known_asks_for_its_throughput(monkeypatch):
    monkeypatch.setattr(gpu, "ask_driver", lambda what: "NVIDIA H100 80GB HBM3")
    assert gpu.find_peak_tflops() == 989.0
    monkeypatch.setattr(gpu, "ask_driver", lambda what: "NVIDIA Something")
    with pytest.raises(SystemExit, match="--peak-tflops"):
        gpu.find_peak_tflops()


@pytest.mark.parametrize(("shown", "one"), [(None, "0"), ("", "0"), ("3,1", "3"), ("GPU-2ab, GPU-1", "GPU-2ab")])
def test_every_program_and_the_memory_watch_are_given_the_same_one_gpu(shown, one, task, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    seen = []
    monkeypatch.setattr(gpu, "watch_memory", lambda worker, peaks: seen.append(gpu.name_gpu()))
    code = 'import os; print(os.environ["CUDA_DEVICE_ORDER"], os.environ["CUDA_VISIBLE_DEVICES"])'
    gpu.run(gpu.Program("any", Path(sys.executable), "", lambda program, each: [str(program), "-c", code]), task)
    assert (task.folder / "any-30.log").read_text().split() == ["PCI_BUS_ID", one] and seen == [one]


def test_a_program_that_fails_is_named_with_its_output(task, monkeypatch):
    monkeypatch.setattr(gpu, "watch_memory", lambda worker, peaks: worker.wait())
    fails = gpu.Program("any", Path("/bin/false"), "", lambda program, each: shlex.split(str(program)))
    with pytest.raises(SystemExit, match=r"any ended with 1; its output is in .*any-30\.log"):
        gpu.run(fails, task)
