"""A merged model answers as adapter beside base did; every weight has its place; errors are one sentence."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cqlora.base import read_base, read_card
from cqlora.config.choices import (
    AdapterMethod,
    Attention,
    Device,
    Embeddings,
    MergeOnto,
    ModelFormat,
    Precision,
    Quantization,
)
from cqlora.config.schema import HardwareConfig, LoraConfig, ModelConfig
from cqlora.data.chat import CHAT_TEMPLATE, ChatEncoder, render_turns
from cqlora.data.records import Turn
from cqlora.data.tokenizer import PlainTokenizer
from cqlora.errors import ConfigError, ModelError
from cqlora.merge import MergeConfig
from cqlora.model.adapters import adapter_state, attach_adapter, save_adapter
from cqlora.model.load import load_base
from cqlora.weights.merge import plan_merge, write_merge
from tests.cards import change_card
from tests.conftest import ROOT, run_python, run_verb
from tests.weights.adapters import attach, load, logits, write_adapter

pytestmark = pytest.mark.usefixtures("_small_blocks")

SIXTEEN, NF4 = MergeOnto["16bit"], MergeOnto["nf4"]
ROWS = [300, 17, 305]

KINDS = {
    "lora": {},
    "all layers": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "dora, both embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
    "rows": {"trainable_token_indices": ROWS},
    "rows of both": {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}},
    "other rows of each": {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": [5]}},
    "rows of the head": {"trainable_token_indices": {"lm_head": ROWS}},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved head and norms": {"modules_to_save": ["lm_head", "norm", "input_layernorm"]},
    "embedding kept whole too": {"target_modules": ["q_proj", "embed_tokens"], "embeddings": True},
}
KEPT_TIED = {
    "both embeddings, kept tied": {
        "target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True,
    },
    "dora of both, kept tied": {
        "target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "ensure_weight_tying": True,
    },
    "saved embedding, kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}  # fmt: skip
STAY_TIED = {
    "lora", "all layers", "rslora", "dora", "patterns", "rslora, patterns", "rows", "rows of both",
    "both embeddings, kept tied", "saved embedding, kept tied",
}  # fmt: skip
"""What leaves one matrix for input and output."""


def options(base: Path, adapters: list[Path], output: Path, **changed) -> MergeConfig:
    return MergeConfig(base=str(base), adapter=[str(folder) for folder in adapters], output_dir=str(output), **changed)


def merge(base: Path, adapters: list[Path], output: Path, **changed) -> Path:
    config = options(base, adapters, output, **changed)
    plan = plan_merge(base, adapters, config.onto, config.double_quantization, config.precision)
    write_merge(plan, output, config)
    return output


def merged_by_peft(base: Path, adapter: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attach(load(base), adapter).merge_and_unload()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_gives_the_weights_of_pefts_merge_and_the_logits_of_its_forward(kind, untied, tmp_path):
    adapter = write_adapter(untied, tmp_path / "adapter", **KINDS[kind])
    output = merge(untied, [adapter], tmp_path / "merged")
    expected = merged_by_peft(untied, adapter).state_dict()
    found = load_file(output / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-6, rtol=2e-6, msg=name)
    beside, alone = logits(attach(load(untied), adapter)), logits(load(output))
    assert (beside - alone).abs().max() < 1e-4
    assert (alone - logits(load(untied))).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS | KEPT_TIED)
def test_a_tied_base_is_untied_where_the_adapter_changes_one_of_its_embeddings(kind, tied, tmp_path):
    """PEFT's merge is no reference here: it adds to the one matrix what was trained for one of its two uses."""
    adapter = write_adapter(tied, tmp_path / "adapter", **(KINDS | KEPT_TIED)[kind])
    output = merge(tied, [adapter], tmp_path / "merged")
    merged = load(output)
    assert (logits(attach(load(tied), adapter)) - logits(merged)).abs().max() < 1e-4
    one = kind in STAY_TIED
    assert ("lm_head.weight" in load_file(output / "model.safetensors")) is not one
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is one
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is one


@pytest.mark.parametrize(
    "kinds", [("lora", "rows"), ("dora", "dora"), ("embedding", "saved embedding"), ("rows", "rows")]
)
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_adapters_in_a_row_are_each_merged_into_what_the_ones_before_gave(base, kinds, request, tmp_path):
    base = request.getfixturevalue(base)
    first = write_adapter(base, tmp_path / "first", **KINDS[kinds[0]])
    between = merge(base, [first], tmp_path / "between")
    second = write_adapter(between, tmp_path / "second", seed=2, **KINDS[kinds[1]])
    beside = logits(attach(load(between), second))
    assert (beside - logits(load(merge(base, [first, second], tmp_path / "once")))).abs().max() < 1e-4
    assert (beside - logits(load(merge(between, [second], tmp_path / "twice")))).abs().max() < 1e-4


def trained(
    base_folder: Path, folder: Path, quantization=Quantization.none, method=AdapterMethod.lora, double=True, rank=4
) -> Path:
    """An adapter as `cqlora run` saves it, its weights random; what it computed is `folder`/logits."""
    base = read_base(base_folder)
    shape = ModelConfig(
        name="tiny", path=str(base_folder), vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, quantization=quantization,
        double_quantization=double, attention=Attention.documents,
    )  # fmt: skip
    hardware = HardwareConfig(name="cpu", device=Device.cpu)
    model = load_base(base, shape, hardware, torch.device("cpu"), torch.float32)
    adapted = attach_adapter(model, base, LoraConfig(method=method, rank=rank), Embeddings.frozen, "").eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    save_adapter(adapted, folder, base, adapter_state(adapted))
    save_file({"logits": logits(adapted)}, folder.with_suffix(".logits"))
    return folder


@pytest.mark.parametrize("method", [AdapterMethod.lora, AdapterMethod.dora])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_onto_nf4_gives_the_very_model_that_was_trained(method, double, untied, tmp_path):
    adapter = trained(untied, tmp_path / "adapter", Quantization.nf4, method, double)
    output = merge(untied, [adapter], tmp_path / "merged", onto=NF4)
    seen = load_file(tmp_path / "adapter.logits")["logits"]
    assert (seen - logits(load(output))).abs().max() < 1e-4
    assert (seen - logits(load(merge(untied, [adapter], tmp_path / "sixteen")))).abs().max() > 1e-3


def test_onto_nf4_is_refused_for_an_adapter_that_was_not_trained_so(untied, tmp_path):
    plain = trained(untied, tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"model\.quantization=none; use onto=16bit"):
        merge(untied, [plain], tmp_path / "merged", onto=NF4)
    with pytest.raises(ConfigError, match="one after the other"):
        merge(untied, [plain, write_adapter(untied, tmp_path / "b")], tmp_path / "merged", onto=NF4)
    pissa = trained(untied, tmp_path / "pissa", Quantization.nf4)
    change_card(pissa, trained_on=read_card(pissa)["trained_on"] | {"method": "pissa"})
    with pytest.raises(ModelError, match="PiSSA"):
        merge(untied, [pissa], tmp_path / "merged", onto=NF4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_base_keeps_its_type_and_is_added_to_in_float32(dtype, untied, tmp_path):
    model = load(untied).to(dtype)
    model.save_pretrained(tmp_path / "base")
    shutil.copy(untied / "tokenizer.json", tmp_path / "base")
    adapter = write_adapter(untied, tmp_path / "adapter", use_dora=True)
    output = merge(tmp_path / "base", [adapter], tmp_path / "merged")
    expected = merged_by_peft(tmp_path / "base", adapter).state_dict()
    for name, tensor in load_file(output / "model.safetensors").items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor, expected[name].to(dtype), atol=0, rtol=torch.finfo(dtype).eps)


def test_a_sharded_base_gives_the_same_as_one_in_one_file(untied, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(untied, base)
    (base / "model.safetensors").unlink()
    load(untied).save_pretrained(base, max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    adapter = write_adapter(untied, tmp_path / "adapter")
    one = load(merge(untied, [adapter], tmp_path / "one")).state_dict()
    many = merge(base, [adapter], tmp_path / "many", max_shard_size="50KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    assert all(torch.equal(tensor, one[name]) for name, tensor in load(many).state_dict().items())


def test_tokenizer_template_generation_settings_and_added_rows_go_along(untied, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(untied, base)
    (base / "LICENSE").write_text("as the base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (base / "runs").mkdir()
    (base / "cqlora.json").write_text(json.dumps({"first_added_row": 300, "added_rows": 12, "weights_sha256": "old"}))
    adapter = write_adapter(base, tmp_path / "adapter")
    output = merge(base, [adapter], tmp_path / "merged")
    carried = {str(file.relative_to(base)) for file in base.rglob("*") if file.is_file()}
    carried -= {"model.safetensors", "cqlora.json", "config.json"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= carried
    for name in carried:
        assert (output / name).read_bytes() == (base / name).read_bytes(), name
    assert not (output / "runs").exists()
    card = json.loads((output / "cqlora.json").read_text())
    assert (card["first_added_row"], card["added_rows"]) == (300, 12)
    assert [entry["onto"] for entry in card["merged"]["adapters"]] == ["16bit"]
    assert read_base(output).first_added_row == 300
    messages = [{"role": "user", "content": "长江"}]
    asked = AutoTokenizer.from_pretrained(output).apply_chat_template(messages, tokenize=False)
    assert "<|im_start|>user\n长江<|im_end|>" in asked


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_instruction_tuning_leaves_the_template_that_it_was_done_in_and_pretraining_the_bases_own(
    stage, untied, tmp_path
):
    base = tmp_path / "base"
    shutil.copytree(untied, base)
    own = "{{ '<|im_start|>system\nof the base<|im_end|>\n' }}" + CHAT_TEMPLATE
    (base / "chat_template.jinja").write_text(own)
    adapter = write_adapter(base, tmp_path / "adapter")
    (adapter / "cqlora.json").write_text(json.dumps({"trained_on": {"quantization": "none", "stage": stage}}))
    output = merge(base, [adapter], tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(output)
    messages = [{"role": "user", "content": "长江"}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ("of the base" in asked) == (stage == "pretrain")
    if stage == "sft":
        ids = ChatEncoder(PlainTokenizer(output)).encode_prompt([Turn("user", "长江")])
        assert tokenizer(asked, add_special_tokens=False)["input_ids"] == ids
    file = next(merge(base, [adapter], tmp_path / "gguf", format=ModelFormat.gguf).glob("*.gguf"))
    from gguf import GGUFReader

    template = GGUFReader(file).get_field("tokenizer.chat_template").contents()
    assert template == (CHAT_TEMPLATE if stage == "sft" else own)


@pytest.mark.parametrize("format", [ModelFormat.safetensors, ModelFormat.gguf])
def test_a_model_tuned_with_a_system_prompt_is_asked_with_it_by_default(untied, tmp_path, format):
    prompt = """你是"小\\助手"🀄。\n{{ 不是 }} {%- 模板 -%} it's brief """
    adapter = write_adapter(untied, tmp_path / "adapter")
    card = {"trained_on": {"quantization": "none", "stage": "sft"}, "system_prompt": prompt}
    (adapter / "cqlora.json").write_text(json.dumps(card))
    output = merge(untied, [adapter], tmp_path / "merged", format=format)
    if format is ModelFormat.gguf:
        from gguf import GGUFReader

        file = next(output.glob("*.gguf"))
        template = GGUFReader(file).get_field("tokenizer.chat_template").contents()
    else:
        assert json.loads((output / "cqlora.json").read_text())["system_prompt"] == prompt
        template = None
    tokenizer = AutoTokenizer.from_pretrained(untied if template else output)
    talk, own = [Turn("user", "长江")], [Turn("system", "own"), Turn("user", "长江")]
    for turns, expected in ((talk, [Turn("system", prompt), *talk]), (own, own)):
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        asked = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert asked == (tokenizer.bos_token or "") + render_turns(expected)

    later = write_adapter(untied, tmp_path / "later", seed=2)
    (later / "cqlora.json").write_text(json.dumps({"trained_on": {"quantization": "none", "stage": "sft"}}))
    if format is ModelFormat.safetensors:
        both = merge(untied, [adapter, later], tmp_path / "both")
        assert json.loads((both / "cqlora.json").read_text())["system_prompt"] == ""
        assert AutoTokenizer.from_pretrained(both).chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("rank", [4, 8])
def test_an_adapter_trained_on_a_merged_model_belongs_there_and_behind_what_was_merged(rank, untied, tmp_path):
    """Of whatever rank: so an adapter is gone on with in another one."""
    first = trained(untied, tmp_path / "first")
    between = merge(untied, [first], tmp_path / "between")
    second = trained(between, tmp_path / "second", rank=rank)
    seen = load_file(tmp_path / "second.logits")["logits"]
    for number, (base, adapters) in enumerate([(between, [second]), (untied, [first, second])]):
        assert (seen - logits(load(merge(base, adapters, tmp_path / f"merged{number}")))).abs().max() < 1e-4
    for adapters in ([second], [second, first]):
        with pytest.raises(ModelError, match="another base"):
            merge(untied, adapters, tmp_path / "refused")
    with pytest.raises(ModelError, match="another base"):
        merge(between, [first], tmp_path / "refused")


def test_an_adapter_without_a_card_is_merged_where_it_fits_and_that_is_reported(untied, tmp_path):
    adapter = write_adapter(untied, tmp_path / "adapter")
    plan = plan_merge(untied, [adapter], SIXTEEN, True, Precision.auto)
    assert len(plan.notes) == 1 and "does not say which base" in plan.notes[0]
    assert not plan_merge(untied, [trained(untied, tmp_path / "t")], SIXTEEN, True, Precision.auto).notes


def edit(file: Path, **changed) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def rename_weights(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)


def break_adapter(folder: Path, how: str) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    card = {"base": "elsewhere", "base_sha256": "v2-0", "tokenizer_sha256": "v2-0"}
    tokenizer = {"model": {"type": "BPE", "vocab": {"<|endoftext|>": 7}}, "added_tokens": []}
    {
        "no weights": lambda: weights.unlink(),
        "no config": lambda: config.unlink(),
        "empty": lambda: save_file({}, weights),
        "truncated": lambda: weights.write_bytes(weights.read_bytes()[:-9]),
        "another base": lambda: (folder / "cqlora.json").write_text(json.dumps(card)),
        "another tokenizer": lambda: (folder / "tokenizer.json").write_text(json.dumps(tokenizer)),
        "another kind": lambda: edit(config, peft_type="LOHA"),
        "another rank": lambda: edit(config, r=8),
        "no magnitudes": lambda: edit(config, use_dora=True),
        "moved base": lambda: edit(config, init_lora_weights="pissa_niter_4"),
        "token-dependent": lambda: edit(config, alora_invocation_tokens=[1, 2]),
        "more layers": lambda: rename_weights(folder, "layers.1", "layers.7"),
        "unknown parts": lambda: rename_weights(folder, "lora_A", "lora_E"),
        "half a pair": lambda: rename_weights(folder, "1.self_attn.q_proj.lora_A", "1.self_attn.k_proj.lora_A"),
        "other module": lambda: rename_weights(folder, "down_proj", "up_proj"),
    }[how]()  # fmt: skip


@pytest.mark.parametrize(
    "how, words",
    [
        ("no weights", "has no adapter_model.safetensors; give the adapter/ folder"),
        ("no config", "has no adapter_config.json"),
        ("empty", "holds no weights"),
        ("truncated", "adapter_model.safetensors cannot be read .* truncated"),
        ("another base", "was trained on another tokenizer .elsewhere"),
        ("another tokenizer", "a tokenizer in which '<.endoftext.>' is 7"),
        ("another kind", "is of kind LOHA"),
        ("another rank", "of rank 4 and its adapter_config.json says 8"),
        ("no magnitudes", "has no lora_magnitude_vector of .* and its adapter_config.json says use_dora"),
        ("moved base", "init_lora_weights=pissa_niter_4"),
        ("token-dependent", "uses alora_invocation_tokens"),
        ("more layers", r"6 weights without a place .*layers\.7\.mlp\.down_proj"),
        ("unknown parts", r"12 weights without a place .*lora_B|12 weights without a place"),
        ("half a pair", r"2 weights without a place .*k_proj\.lora_A.*q_proj\.lora_B"),
        ("other module", r"does not fit model\.layers\.\d\.mlp\.up_proj\.weight .*\[128, 64\]"),
    ],
)
def test_an_adapter_that_does_not_belong_is_one_sentence_and_writes_nothing(how, words, untied, tmp_path):
    adapter = write_adapter(untied, tmp_path / "adapter")
    break_adapter(adapter, how)
    with pytest.raises(ModelError, match=words) as caught:
        merge(untied, [adapter], tmp_path / "merged")
    assert "\n" not in str(caught.value)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter"}


def test_a_base_that_is_not_whole_or_quantised_already_is_refused(untied, tmp_path):
    adapter = write_adapter(untied, tmp_path / "adapter")
    base = tmp_path / "base"
    shutil.copytree(untied, base)
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-5000])
    with pytest.raises(ModelError, match="truncated"):
        merge(base, [adapter], tmp_path / "merged")
    (base / "model.safetensors").write_bytes(whole)
    edit(base / "config.json", quantization_config={"load_in_4bit": True})
    with pytest.raises(ModelError, match="quantised already"):
        merge(base, [adapter], tmp_path / "merged")
    with pytest.raises(ModelError, match="does not exist"):
        merge(tmp_path / "nowhere", [adapter], tmp_path / "merged")
    merge(untied, [adapter], tmp_path / "merged")
    with pytest.raises(ModelError, match="already there"):
        merge(untied, [adapter], tmp_path / "merged")


def test_numbers_that_the_base_cannot_hold_are_refused_by_name_and_nothing_is_left(untied, tmp_path):
    load(untied).half().save_pretrained(tmp_path / "base")
    shutil.copy(untied / "tokenizer.json", tmp_path / "base")
    adapter = write_adapter(untied, tmp_path / "adapter", lora_alpha=10_000_000)
    with pytest.raises(ModelError, match=r"_proj\.weight does not fit in the base's F16"):
        merge(tmp_path / "base", [adapter], tmp_path / "merged")
    assert {file.name for file in tmp_path.iterdir()} == {"adapter", "base"}


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"adapter": []}, "merges nothing"),
        ({"adapter": 3}, "is no folder"),
        ({"adapter": ["a", "a"]}, "names a folder twice"),
        ({"measure": "nowhere.txt"}, "does not exist"),
        ({"max_shard_size": "much"}, "is not a size"),
    ],
)
def test_options_that_contradict_are_refused_before_torch_is_needed(changed, words):
    with pytest.raises(ConfigError, match=words):
        MergeConfig(**{"base": "b", "adapter": "a", "output_dir": "o"} | changed)


def test_the_verb_and_the_older_script_merge_and_measure(untied, tmp_path):
    adapter = trained(untied, tmp_path / "adapter", Quantization.nf4)
    text = tmp_path / "text.txt"
    text.write_text("长江是亚洲最长的河流。" * 9)
    arguments = [f"base={untied}", f"adapter={adapter}", f"output_dir={tmp_path}/merged", f"measure={text}"]
    output = run_verb(tmp_path, "merge", *arguments).stdout
    assert "1 adapter merged, into 14 of 21 tensors." in output
    sixteen, nf4 = (line.split() for line in output.splitlines()[-2:])
    assert sixteen[0] == "16bit" and nf4[0] == "nf4"
    assert float(nf4[1]) < 1e-3 < float(sixteen[1]) and nf4[3] == "100.00%"
    flags = ["--lora_model_path", adapter, "--base_model_path", untied, "--output_model_path", tmp_path / "again"]
    run_python(tmp_path, ROOT / "scripts" / "merge_lora_model.py", *flags)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    refused = run_verb(tmp_path, "merge", *arguments[:2], "output_dir=x", "onto=nf5", expect=2).stderr
    assert "did you mean onto=nf4?" in refused
