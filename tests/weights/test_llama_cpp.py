"""llama.cpp reads our GGUF files as transformers reads the merged folder: the same ids, logits and greedy tokens.

Optional: runs where llama-cpp-python is installed, which compiles for minutes.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoTokenizer

from cqlora.config.choices import GgufType, ModelFormat
from cqlora.data.chat import ChatEncoder
from cqlora.data.records import Turn
from cqlora.data.tokenizer import PlainTokenizer
from cqlora.vocab.config import VocabConfig, VocabKind
from cqlora.weights.convert import convert
from tests.vocab.bases import write_corpus
from tests.weights.adapters import load, write_adapter, write_tiny_base
from tests.weights.meta_reference import Shape, random_state, write_checkpoint, write_pieces, write_ranks
from tests.weights.test_merge import merge

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (docs/merging.md)")

TEXTS = [
    "长江 is 1234 km?", "  two  spaces\n\n\ttab ", "Äöü 你好，世界！it's DON'T", "😀👨‍👩‍👧 e\u0301", "龘𠀀 rare", "\n",
    "   ", "<|im_end|> </s> <s>", "机器学习模型需要大量的数据，数据的质量决定模型的质量。", "x\u00a0y\u3000z\u200b",
    "3.14159 1,000 ２",
]  # fmt: skip
CHAT = [
    Turn("system", "请简短回答。"), Turn("user", "人工智能 1234 <|im_end|>?"), Turn("assistant", "Yes: 好。"),
    Turn("user", "  The lazy dog\n"),
]  # fmt: skip
TOLERANCE = {GgufType.f16: 0.01, GgufType.q8_0: 0.25}
"""Of logits, in their standard deviations: llama.cpp rounds what it multiplies as the file's matrices are rounded."""
AGREEMENT = {GgufType.f16: 0.98, GgufType.q8_0: 0.9}
"""Share of the places whose likeliest token is the same; a random model's tokens are about equally likely."""


def write_extended_base(folder: Path, pieces: bool, tied: bool) -> Path:
    """A base whose Chinese vocabulary was added, with rows that every type of GGUF takes."""
    raw = folder.parent / "raw"
    raw.mkdir()
    tokens = (write_pieces if pieces else write_ranks)(raw / "tokenizer.model")
    shape = Shape(vocab=tokens, dim=64, hidden=128, kv_heads=2, tied=tied, scaled=tied)
    # Large weights make a layer turn rounding into another answer.
    small = {name: tensor * 0.3 if tensor.ndim == 2 else tensor for name, tensor in random_state(shape).items()}
    write_checkpoint(raw, shape, small)
    kind = VocabKind.sentencepiece if pieces else VocabKind.bpe
    corpus = str(write_corpus(folder.parent / "corpus.txt"))
    convert(raw, folder, "", "auto", 10**9, VocabConfig(kind=kind, size=400 if pieces else 60, corpus=[corpus]))
    return folder


BASES = {
    "byte-level": write_tiny_base,
    "byte-level, tied": lambda folder: write_tiny_base(folder, tied=True),
    "byte-level, extended, tied": lambda folder: write_extended_base(folder, pieces=False, tied=True),
    "byte-level, extended": lambda folder: write_extended_base(folder, pieces=False, tied=False),
    "pieces, extended": lambda folder: write_extended_base(folder, pieces=True, tied=False),
}


class Merged:
    """A model merged three times: a folder, and both GGUF files."""

    def __init__(self, folder: Path, kind: str) -> None:
        base = BASES[kind](folder / "base")
        adapter = write_adapter(base, folder / "adapter")
        self.folder = merge(base, [adapter], folder / "merged")
        self.files = {}
        for kind in GgufType:
            output = merge(base, [adapter], folder / kind.value, format=ModelFormat.gguf, gguf_type=kind)
            self.files[kind] = output / f"{kind.value}.{kind.value}.gguf"
        self.tokenizer = PlainTokenizer(self.folder)
        self.prompt = ChatEncoder(self.tokenizer).encode_prompt(CHAT)

    def open_llama(self, kind: GgufType):
        """llama.cpp with float32 keys and values, so that the file alone makes a difference."""
        return llama_cpp.Llama(
            str(self.files[kind]), n_ctx=256, n_threads=1, logits_all=True, type_k=0, type_v=0, verbose=False
        )


@pytest.fixture(scope="module", params=BASES)
def merged(request, tmp_path_factory) -> Merged:
    return Merged(tmp_path_factory.mktemp("llama"), request.param)


def test_texts_and_conversations_have_the_ids_of_the_folders_tokenizer(merged):
    llama = merged.open_llama(GgufType.f16)
    for text in TEXTS:
        expected = merged.tokenizer.text.encode(text, add_special_tokens=False).ids
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == expected, text
    # The template's text knows no difference between a control token and its name in a message.
    turns = [{"role": turn.role, "content": turn.text.replace("<|im_end|>", "")} for turn in CHAT]
    stock = AutoTokenizer.from_pretrained(merged.folder)
    text = llama.metadata["tokenizer.chat_template"]
    rendered = stock.apply_chat_template(turns, chat_template=text, add_generation_prompt=True, tokenize=False)
    prompt = ChatEncoder(merged.tokenizer).encode_prompt([Turn(turn["role"], turn["content"]) for turn in turns])
    assert llama.tokenize(rendered.encode(), add_bos=False, special=True) == prompt


def test_special_tokens_are_the_folders(merged):
    llama = merged.open_llama(GgufType.q8_0)
    config = load(merged.folder).config
    assert (llama.token_bos(), llama.n_vocab()) == (config.bos_token_id, config.vocab_size)
    assert llama.tokenize(b"a b") == AutoTokenizer.from_pretrained(merged.folder)("a b")["input_ids"]
    assert llama_cpp.llama_vocab_is_eog(llama._model.vocab, merged.tokenizer.special.turn_end)


@pytest.mark.parametrize("kind", GgufType, ids=[kind.value for kind in GgufType])
def test_logits_after_a_prompt_and_greedy_tokens_are_those_of_transformers(merged, kind):
    llama, stock = merged.open_llama(kind), load(merged.folder)
    with torch.no_grad():
        made = stock.generate(torch.tensor([merged.prompt]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
        expected = stock(input_ids=made, use_cache=False).logits[0].numpy()
    ids = made[0].tolist()
    llama.eval(ids)
    found = np.array(llama.scores[: len(ids)])
    tolerance = TOLERANCE[kind] * expected.std()
    assert np.abs(found - expected).max() < tolerance
    assert (found.argmax(1) == expected.argmax(1)).mean() > AGREEMENT[kind]
    ordered = np.sort(expected, axis=1)
    lead = ordered[:, -1] - ordered[:, -2]
    llama.reset()
    llama.eval(merged.prompt)
    for place in range(len(merged.prompt) - 1, len(ids) - 1):
        token = int(llama.scores[place].argmax())
        if token != ids[place + 1]:
            assert lead[place] < 2 * tolerance, f"parts at token {place + 1 - len(merged.prompt)}, and not at a tie"
            break
        llama.eval([token])


def test_q8_0_is_what_llama_cpp_itself_makes_of_the_f16_file(merged, tmp_path):
    """Of numbers that float16 holds, that is: ours are rounded once, from float32."""
    base = tmp_path / "base"
    load(merged.folder).half().save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"):
        if (merged.folder / name).is_file():
            (base / name).write_bytes((merged.folder / name).read_bytes())
    ours = {}
    for kind in GgufType:
        output = merge(base, [], tmp_path / kind.value, format=ModelFormat.gguf, gguf_type=kind)
        ours[kind] = output / f"{kind.value}.{kind.value}.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 1
    theirs = tmp_path / "theirs.gguf"
    names = (str(ours[GgufType.f16]).encode(), str(theirs).encode())
    assert llama_cpp.llama_model_quantize(*names, parameters) == 0
    expected = {tensor.name: tensor for tensor in GGUFReader(theirs).tensors}
    found = {tensor.name: tensor for tensor in GGUFReader(ours[GgufType.q8_0]).tensors}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tensor_type == tensor.tensor_type and np.array_equal(found[name].data, tensor.data), name
