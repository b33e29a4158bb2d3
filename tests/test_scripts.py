"""The wrappers in scripts/ say in the command line's terms what the older scripts were told."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from cqlora.errors import ConfigError
from tests.conftest import ROOT, run_python


def load_script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_reads_groups_keys_and_nodes_of_a_file(tmp_path: Path) -> None:
    conf = tmp_path / "conf.yaml"
    conf.write_text(
        "stage: sft\ndata: sample\nhardware: 4xa100\ntracking: none\nstage.learning_rate: 1e-3\nseed: 7\n"
        "lora: {rank: 4, target_modules: [q_proj, v_proj]}\nhydra.run.dir: a folder/x\n"
    )
    shown = run_python(tmp_path, ROOT / "scripts" / "train.py", conf, "seed=8", "--cfg", "job").stdout
    for line in ("seed: 8", "  rank: 4", "  - q_proj", "  learning_rate: 0.001", "  name: 4xa100", "  name: sft"):
        assert f"\n{line}\n" in shown, line


def test_train_without_a_file_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"needs a YAML file of choices, got \['stage=sft'\]"):
        load_script("train").translate(["stage=sft"])


def test_convert_takes_the_known_flags() -> None:
    flags = ["--input_dir", "my llama", "--model_size", "65B", "--output_dir", "out", "vocab=cjk"]
    assert load_script("convert_llama_to_hf").translate(flags) == [
        "input_dir='my llama'",
        "model_size='65B'",
        "output_dir='out'",
        "vocab=cjk",
    ]
