"""A rotary scaling is read alike from every spelling, and comes back from a GGUF file."""

import json
from pathlib import Path
from typing import Any

import pytest

from cqlora.config.choices import GgufType
from cqlora.errors import ModelError
from cqlora.positions import read_rope
from cqlora.system.shards import ShardReader
from cqlora.vocab.config import VocabConfig
from cqlora.weights.convert import convert
from cqlora.weights.gguf import GgufModel
from cqlora.weights.gguf_write import write_gguf
from tests.weights.meta_reference import Shape, random_state, write_checkpoint, write_pieces


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, {"rope_type": "default", "rope_theta": 10_000.0}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_scaling": {"type": "linear", "factor": 8}}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 8}),
        (
            {"rope_theta": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 2}},
            {"rope_type": "linear", "rope_theta": 2e4, "factor": 2},
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, {"rope_type": "yarn", "rope_theta": 1e6}),
    ],
)
def test_every_spelling_is_read(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_rope(config) == expected


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted base with a SentencePiece tokenizer."""
    folder = tmp_path_factory.mktemp("rope")
    raw = folder / "raw"
    raw.mkdir()
    shape = Shape(vocab=write_pieces(raw / "tokenizer.model"))
    write_checkpoint(raw, shape, random_state(shape))
    convert(raw, folder / "base", "", "auto", 10**9, VocabConfig())
    return folder / "base"


def test_an_old_linear_scaling_goes_into_a_gguf_file_and_comes_back(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= {"rope_theta": 20_000.0, "rope_scaling": {"type": "linear", "factor": 8.0}}
    write_gguf(tmp_path / "a.v1.f16.gguf", ShardReader(base), config, base, GgufType.f16)
    model = GgufModel(tmp_path / "a.v1.f16.gguf")
    assert model.config()["rope_parameters"] == {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 8.0}
    assert model.field("general.name") == "a.v1"


def test_yarn_in_the_old_spelling_goes_into_a_gguf_file_and_comes_back(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text()) | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    config.pop("rope_parameters", None)
    write_gguf(tmp_path / "m.f16.gguf", ShardReader(base), config, base, GgufType.f16)
    expected = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}
    expected["original_max_position_embeddings"] = config["max_position_embeddings"]
    assert GgufModel(tmp_path / "m.f16.gguf").config()["rope_parameters"] == expected


def test_a_scaling_that_gguf_cannot_say_is_refused_in_the_old_spelling_too(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text()) | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}
    config.pop("rope_parameters", None)
    with pytest.raises(ModelError, match="dynamic"):
        write_gguf(tmp_path / "m.f16.gguf", ShardReader(base), config, base, GgufType.f16)
