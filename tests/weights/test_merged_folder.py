"""A merged folder is laid out as transformers and vLLM load one: config, tokenizer, weights and their index, ends."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.merge import MergeConfig
from cqlora.weights.merge import plan_merge, write_merge
from tests.weights.adapters import write_adapter

pytestmark = pytest.mark.usefixtures("_small_blocks")

BESIDE = {
    "README.md", "chat_template.jinja", "config.json", "cqlora.json", "generation_config.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
"""What may lie beside the weights: neither program takes any of it for weights or code."""


@pytest.fixture(params=["whole", "sharded", "tied"])
def merged(request, untied, tied, tmp_path) -> Path:
    base, output = tied if request.param == "tied" else untied, tmp_path / "merged"
    adapter = write_adapter(base, tmp_path / "adapter")
    (adapter / "cqlora.json").write_text(json.dumps({"trained_on": {"quantization": "none", "stage": "sft"}}))
    size = "50KB" if request.param == "sharded" else "5GB"
    config = MergeConfig(base=str(base), adapter=[str(adapter)], output_dir=str(output), max_shard_size=size)
    write_merge(plan_merge(base, [adapter], config.onto, True, config.precision), output, config)
    return output


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def tensors_of(files: list[Path]) -> dict[str, tuple[str, tuple[int, ...], str, int]]:
    """Each tensor with its file, shape, type and bytes; transformers refuses a file that does not say whose it is."""
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                assert name not in found
                tensor = opened.get_tensor(name)
                found[name] = (file.name, tuple(tensor.shape), str(tensor.dtype).partition(".")[2], tensor.nbytes)
    return found


def test_weights_are_safetensors_under_the_names_that_the_index_gives(merged):
    files = sorted(merged.glob("*.safetensors"))
    index = merged / "model.safetensors.index.json"
    rest = {file.name for file in merged.iterdir()} - {file.name for file in files} - {index.name}
    assert rest <= BESIDE
    found = tensors_of(files)
    if len(files) == 1:
        # vLLM reads every safetensors file that there is, and no index where there is one file.
        assert files[0].name == "model.safetensors" and not index.exists()
        return
    total = len(files)
    assert [file.name for file in files] == [f"model-{n:05}-of-{total:05}.safetensors" for n in range(1, total + 1)]
    assert read(index)["weight_map"] == {name: file for name, (file, *_) in found.items()}
    assert read(index)["metadata"]["total_size"] == sum(size for *_, size in found.values())


def test_the_configuration_names_a_stock_class_its_type_and_as_many_rows_as_there_are(merged):
    config = read(merged / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert not {"auto_map", "quantization_config"} & config.keys()
    found = tensors_of(sorted(merged.glob("*.safetensors")))
    assert {dtype for _, _, dtype, _ in found.values()} == {config.get("dtype") or config["torch_dtype"]}
    assert found["model.embed_tokens.weight"][1] == (config["vocab_size"], config["hidden_size"])
    assert ("lm_head.weight" in found) == (not config["tie_word_embeddings"])
    assert AutoConfig.from_pretrained(merged).num_hidden_layers == config["num_hidden_layers"]


def test_transformers_finds_every_weight_and_no_other(merged):
    _, report = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(report.values()), report


def test_the_tokenizer_needs_no_code_of_ours_and_replies_end_at_the_templates_token(merged):
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert "auto_map" not in read(merged / "tokenizer_config.json")
    assert len(tokenizer) <= read(merged / "config.json")["vocab_size"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    ends = GenerationConfig.from_pretrained(merged).eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (ends if isinstance(ends, list) else [ends])
