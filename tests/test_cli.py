"""The command line as a person meets it: fast, one sentence, the nearest name; and no heavy import before that."""

import os
import signal
import subprocess
import sys

import pytest

from cqlora.cli import check_words, order_flags, quote_words
from cqlora.config.secrets import refuse_secrets
from cqlora.errors import ConfigError
from tests.conftest import ROOT, run_verb


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["stage=pretrain", "stage.lerning_rate=1"], "did you mean stage.learning_rate?"),
        (["stage=pretrain", "learning_rate=1"], "did you mean stage.learning_rate=1?"),
        (["stage=pretrain", "+stage.x=1"], "stage.x is not a key"),
        (["stage=pretrain", "stage.learning_rate=abc"], "stage.learning_rate=abc is not of type float"),
        (["stage=pretrain", "stage.max_steps=1.5"], "stage.max_steps=1.5 is not of type integer"),
        (["stage=pretrain", "model=llama_6b"], "did you mean model=llama_65b?"),
        (["stage=pretrian"], "did you mean stage=pretrain?"),
        (["stage=pretrain", "lora.method=lorra"], "did you mean lora.method=lora?"),
        (["stage=pretrain", "modle=tiny"], "did you mean model?"),
        (["stage=pretrain", "stage.system_prompt=x"], "choose the stage that has it"),
        (["stage=pretrain", "seed=[1"], "not of the form key=value"),
        ([], "add stage=pretrain or sft"),
        (["stage=sft", "hardware=4xa100"], "hardware=cpu"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, call_verb, arguments, words):
    done = call_verb(tmp_path, "run", *arguments, expect=2)
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_help_and_cfg_load_neither_torch_nor_transformers_nor_wandb(tmp_path):
    code = (
        "import contextlib, sys\n"
        "from cqlora.run import main\n"
        "for flags in (['--help'], ['stage=pretrain', '--cfg', 'job'], ['stage=pretrain', 'hardware=4xa100']):\n"
        "    sys.argv[1:] = flags\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "    print('LOADED', sorted({'torch', 'transformers', 'wandb', 'peft'} & set(sys.modules)), flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.count("LOADED []") == 3, done.stderr
    shown, composed, nothing, rest = done.stdout.split("LOADED []\n")
    assert "experiment:" in shown and "lora:" in composed and "hardware=cpu" in done.stderr and not nothing + rest


def test_help_lists_every_group_without_a_stage(tmp_path, call_verb):
    output = call_verb(tmp_path, "run", "--help").stdout
    for group in ("model:", "data:", "stage:", "hardware:", "tracking:", "experiment:"):
        assert group in output


def test_the_console_script_names_the_nearest_verb(workspace):
    done = run_verb(workspace, "cli", "trian", expect=2)
    assert done.stderr.startswith("error: `cqlora trian` is not a verb")
    assert "run " in run_verb(workspace, "cli", "--help").stdout


def test_flags_may_stand_anywhere():
    typed = ["stage=sft", "--multirun", "seed=1,2", "--config-dir", "mine", "model=tiny"]
    assert order_flags(typed) == ["stage=sft", "seed=1,2", "model=tiny", "--multirun", "--config-dir", "mine"]
    assert order_flags(["--info", "config", "a=1", "-m"]) == ["a=1", "--info", "config", "-m"]


@pytest.mark.parametrize(
    "argument",
    ["+tracking.api_key=abc", "tracking.project=0123456789abcdef0123456789abcdef01234567", "+data.hf_token=x",
     "tracking.tags=[hf_AbCdEfGhIjKlMnOpQrStUvWxYz]", "tracking.group=planted-secret-value"],
)  # fmt: skip
def test_a_secret_in_an_override_is_refused_before_anything_is_written(argument, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "planted-secret-value")
    with pytest.raises(ConfigError, match="environment"):
        refuse_secrets([argument])


def test_ordinary_overrides_are_no_secrets():
    refuse_secrets(["stage.max_tokens=5", "model.path=models/tiny", "stage.learning_rate=1e-4", "--multirun"])
    assert order_flags(["model.path=models/tiny"]) == ["model.path=models/tiny"]


@pytest.mark.parametrize(
    "typed, passed",
    [
        ("system=用中文简短回答。", "system='用中文简短回答。'"),
        ("base=模型/底座", "base='模型/底座'"),
        ("vocab.corpus=[语料/甲.jsonl,b.jsonl]", "vocab.corpus=['语料/甲.jsonl',b.jsonl]"),
        ("name=一,二", "name='一','二'"),
        ("name='已加引号'", "name='已加引号'"),
        ("seed=1,2", "seed=1,2"),
        ("model.path=~/llama", "model.path='~/llama'"),
        ("model.path=models/a=b", "model.path='models/a=b'"),
        ("model.path=/a/b (1)", "model.path='/a/b (1)'"),
        ("hydra.run.dir=~/runs", f"hydra.run.dir={os.path.expanduser('~/runs')}"),
        ("seed=range(1,4)", "seed=range(1,4)"),
        ("name=${oc.env:HOME}/a=b", "name=${oc.env:HOME}/a=b"),
        ("--multirun", "--multirun"),
    ],
)
def test_chinese_values_and_paths_need_no_quotes_of_their_own(typed: str, passed: str) -> None:
    assert quote_words(typed) == passed


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--stage", "sft"], "--stage is no flag; keys are typed without dashes, as in stage=VALUE"),
        (["stage=sft", "--model_name_or_path=x"], "as in model_name_or_path=x"),
        (["stage", "sft"], "`stage` is not of the form KEY=VALUE; type stage=VALUE"),
        (["stage.max_steps＝2"], "full-width"),
        (["“stage.max_steps=2”"], "full-width"),
        (["stage=sft", "hydra.run.dir="], "hydra.run.dir= is empty"),
        (["hydra.sweep.dir=''"], "hydra.sweep.dir= is empty"),
        (["--multirun", "seed=1,2", "--cfg", "job"], "--cfg and --multirun cannot be had at once"),
        (["-m", "-r"], "--multirun and --run cannot be had at once"),
    ],
)
def test_what_is_neither_override_nor_flag_is_refused_in_one_sentence(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_words(arguments)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_overrides_flags_and_their_values_pass() -> None:
    for mode in (["--cfg", "job"], ["-m"], ["--info", "all"]):
        check_words(["stage=sft", "+a.b=1", "~tracking", "--config-dir", "mine", *mode])
    check_words(["--config-dir=mine", "data.sources.t.path=语料＝一.txt", "hydra.run.dir=outputs/x"])


@pytest.mark.parametrize("arguments", [("cqlora.run", "--help"), ("cqlora", "--help")])
def test_a_reader_that_has_ended_ends_it_in_silence(arguments, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", *arguments], stdout=writing, stderr=subprocess.PIPE, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    os.close(writing)
    assert done.stderr == "" and done.returncode == 128 + signal.SIGPIPE
