"""Differences of models: the closed forms of a chat vector, what goes along, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cqlora.base import read_card
from cqlora.config.choices import MergeOnto, Precision
from cqlora.config.differences import DifferenceConfig
from cqlora.errors import ModelError
from cqlora.merge import MergeConfig
from cqlora.system import shards
from cqlora.weights.merge import plan_merge, write_merge
from cqlora.weights.merge_difference import add_difference
from tests.conftest import run_verb
from tests.weights.adapters import attach, load, logits, write_adapter, write_tiny_base
from tests.weights.test_merge import edit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(shards, "READ_BYTES", 5000)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("difference") / "base", tied=request.param)


def copy_of(base: Path, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 0.1) -> Path:
    """A model like the base, its numbers moved at random."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: (tensor.double() + scale * torch.randn(tensor.shape, generator=generator)).to(dtype)
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def merge(base: Path, output: Path, *differences: tuple[Path, Path, float], adapters: tuple[Path, ...] = ()) -> Path:
    add = [DifferenceConfig(model=str(model), minus=str(minus), weight=weight) for model, minus, weight in differences]
    plan = plan_merge(base, list(adapters), MergeOnto["16bit"], True, Precision.auto, differences=add)
    given = [{"model": each.model, "minus": each.minus, "weight": each.weight} for each in add]
    config = MergeConfig(base=str(base), output_dir=str(output), add=given, adapter=list(map(str, adapters)))
    write_merge(plan, output, config)
    return output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_and_its_difference_to_chat_is_chat_to_the_last_bit(dtype, base, tmp_path):
    """Also where the numbers of the two are many orders of magnitude apart, and one model is zero."""
    start = copy_of(base, tmp_path / "start", 1, dtype)
    chat = copy_of(base, tmp_path / "chat", 2, dtype)
    for folder in (start, chat):
        state = tensors(folder)
        for number, tensor in enumerate(state.values()):
            exponents = torch.linspace(-6, 3, tensor.shape[0]).roll(number).reshape(-1, *[1] * (tensor.dim() - 1))
            tensor.mul_((10.0**exponents).to(dtype))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    found = tensors(merge(start, tmp_path / "merged", (chat, start, 1.0)))
    assert found.keys() == tensors(chat).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(chat).items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_difference_of_a_model_and_itself_changes_nothing(dtype, base, tmp_path):
    start, chat = copy_of(base, tmp_path / "start", 1, dtype), copy_of(base, tmp_path / "chat", 2, dtype)
    found = tensors(merge(start, tmp_path / "merged", (chat, chat, 0.7)))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(start).items())


def test_sums_are_exact_where_floats_of_64_bits_alone_would_lose_a_number():
    base = torch.tensor([1e30, 1.0, 3.0])
    model = torch.tensor([1e-30, 1e-38, -7.0])
    assert torch.equal(add_difference(base, model, base, 1.0), model)
    assert not torch.equal((base.double() + (model.double() - base.double())).float(), model)


def test_several_differences_with_weights_are_those_of_float64(base, tmp_path):
    a, b, c = (copy_of(base, tmp_path / name, seed) for seed, name in enumerate("abc", start=1))
    found = tensors(merge(base, tmp_path / "merged", (a, b, 0.5), (c, b, -0.25)))
    stored = [{name: tensor.double() for name, tensor in tensors(folder).items()} for folder in (base, a, b, c)]
    for name, tensor in found.items():
        start, *others = (each[name] for each in stored)
        expected = start + 0.5 * (others[0] - others[1]) - 0.25 * (others[2] - others[1])
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-6, msg=name)


def extended(base: Path, folder: Path, rows: int = 8) -> Path:
    """The base with rows for new tokens behind its own."""
    shutil.copytree(base, folder)
    state = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            state[name] = torch.cat([state[name], torch.full((rows, state[name].shape[1]), 0.25)])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", vocab_size=config["vocab_size"] + rows)
    (folder / "cqlora.json").write_text(
        json.dumps({"first_added_row": config["vocab_size"], "added_rows": rows, "weights_sha256": "old"})
    )
    return folder


def test_rows_of_new_tokens_are_left_alone_and_a_models_further_rows_out(base, tmp_path):
    start, chat = extended(base, tmp_path / "start"), extended(copy_of(base, tmp_path / "c", 2), tmp_path / "chat", 3)
    (chat / "cqlora.json").unlink()
    found, before = tensors(merge(start, tmp_path / "merged", (chat, base, 1.0))), tensors(start)
    own = len(before["model.embed_tokens.weight"]) - 8
    for name, tensor in found.items():
        rows = own if "embed_tokens" in name or "lm_head" in name else len(tensor)
        assert torch.equal(tensor[:rows], tensors(chat)[name][:rows]), name
        assert torch.equal(tensor[rows:], before[name][rows:]), name


@pytest.mark.parametrize("kind", ["lora", "rows of the head"])
def test_a_difference_is_added_to_what_adapters_give(kind, base, tmp_path):
    options = {} if kind == "lora" else {"trainable_token_indices": {"lm_head": [300, 17]}}
    chat, adapter = copy_of(base, tmp_path / "chat", 2), write_adapter(base, tmp_path / "adapter", **options)
    merged = load(merge(base, tmp_path / "merged", (chat, base, 0.5), adapters=(adapter,)))
    plain = load(merge(base, tmp_path / "plain", adapters=(adapter,)))
    theirs, ours = load(chat).state_dict(), load(base).state_dict()
    for name, tensor in plain.state_dict().items():
        expected = tensor + 0.5 * (theirs[name] - ours[name])
        torch.testing.assert_close(merged.state_dict()[name], expected, atol=1e-6, rtol=1e-5, msg=name)
    assert (logits(merged) - logits(attach(load(base), adapter))).abs().max() > 1e-2


def test_template_ends_and_card_of_the_chat_model_go_along_and_those_of_tuning_go_first(base, tmp_path):
    chat = copy_of(base, tmp_path / "chat", 2)
    (chat / "chat_template.jinja").write_text("<|im_start|>as the chat model{{ messages[0].content }}")
    edit(chat / "generation_config.json", eos_token_id=[1, 7])
    output = merge(base, tmp_path / "merged", (chat, base, 0.5))
    talk = [{"role": "user", "content": "长江"}]
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "<|im_start|>as the chat model长江"
    ends = json.loads((output / "generation_config.json").read_text())["eos_token_id"]
    assert {1, 7} <= set(ends)
    (added,) = read_card(output)["merged"]["added"]
    assert added["weight"] == 0.5 and added["model_sha256"] != added["minus_sha256"]
    assert read_card(output)["added_from"] == [[str(chat), str(base), 0.5]]

    tuned = write_adapter(base, tmp_path / "tuned")
    (tuned / "cqlora.json").write_text(json.dumps({"trained_on": {"quantization": "none", "stage": "sft"}}))
    output = merge(base, tmp_path / "tuned too", (chat, base, 0.5), adapters=(tuned,))
    asked = AutoTokenizer.from_pretrained(output).apply_chat_template(talk, tokenize=False)
    assert "as the chat model" not in asked and "<|im_start|>user\n长江<|im_end|>" in asked


def test_a_template_with_control_tokens_that_the_base_lacks_stays_behind(base, tmp_path):
    chat = copy_of(base, tmp_path / "chat", 2)
    (chat / "chat_template.jinja").write_text("<|new|>{{ messages[0].content }}")
    tokenizer = json.loads((chat / "tokenizer.json").read_text())
    new = tokenizer["added_tokens"][-1] | {"id": 319, "content": "<|new|>"}
    tokenizer["added_tokens"].append(new)
    (chat / "tokenizer.json").write_text(json.dumps(tokenizer))
    output = merge(base, tmp_path / "merged", (chat, base, 1.0))
    assert (output / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()


def break_chat(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = next(token for token in tokenizer["model"]["vocab"] if not token.startswith("<"))

    def swap_token() -> None:
        tokenizer["model"]["vocab"]["unheard"] = tokenizer["model"]["vocab"].pop(first)
        tokenizer["model"]["merges"] = []
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    def part_embeddings() -> None:
        edit(folder / "config.json", tie_word_embeddings=not config["tie_word_embeddings"])
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    {
        "heads": lambda: edit(folder / "config.json", num_attention_heads=8, num_key_value_heads=4, head_dim=8),
        "positions": lambda: edit(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "kind": lambda: edit(folder / "config.json", model_type="mistral"),
        "tokens": swap_token,
        "tying": part_embeddings,
        "quantised": lambda: edit(folder / "config.json", quantization_config={"load_in_4bit": True}),
        "none": lambda: shutil.rmtree(folder),
    }[how]()  # fmt: skip


@pytest.mark.parametrize(
    "how, words",
    [
        ("heads", "num_attention_heads is 8 where .* same architecture"),
        ("positions", "rope is .*500000"),
        ("kind", "model_type is 'mistral' where"),
        ("tokens", "the tokenizer that the base was extended from"),
        ("tying", "models that tie them alike"),
        ("quantised", "is quantised"),
    ],
)
def test_a_model_of_another_kind_is_refused_and_nothing_is_written(how, words, base, tmp_path):
    chat = copy_of(base, tmp_path / "chat", 2)
    break_chat(chat, how)
    for pair in ((chat, base, 1.0), (base, chat, 1.0)):
        with pytest.raises(ModelError, match=words) as caught:
            merge(base, tmp_path / "merged", pair)
        assert "\n" not in str(caught.value)
    assert {each.name for each in tmp_path.iterdir()} == {"chat"}


def test_a_model_with_a_tensor_more_is_refused(base, tmp_path):
    chat = copy_of(base, tmp_path / "chat", 2)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    save_file(tensors(chat) | bias, chat / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"q_proj\.bias does not match"):
        merge(base, tmp_path / "merged", (chat, base, 1.0))


def test_the_verb_takes_a_difference_as_text_and_as_a_mapping(base, tmp_path):
    chat = copy_of(base, tmp_path / "chat-model", 2)
    shutil.copytree(base, tmp_path / "the-base")
    told = run_verb(tmp_path, "merge", "base=the-base", "add=[0.5*chat-model-the-base]", "output_dir=one").stdout
    assert "0 adapters merged, 1 difference added" in told
    run_verb(tmp_path, "merge", "base=the-base", "add=[{model:chat-model,minus:the-base,weight:0.5}]", "output_dir=two")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert chat.is_dir()
