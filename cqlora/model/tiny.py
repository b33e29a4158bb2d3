"""`model=tiny`: a small random LLaMA and a tokenizer trained on the bundled sample, so that all runs anywhere."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from cqlora.base import fingerprint_tokenizer, fingerprint_weights, seal_card
from cqlora.config.schema import ModelConfig
from cqlora.system.durable import hold, stage

_CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]


def build_tiny(model: ModelConfig, texts: list[str], chat_template: str, seed: int = 0) -> Path:
    """Write a random model of the configured shape to `model.path`, whole or not at all; return the path.

    The folder depends on the shape and `texts` alone, so every worker and every later run finds the same.
    """
    folder = Path(model.path)
    transformers_logging.disable_progress_bar()
    with hold(folder, wait=True):
        if not (folder / "config.json").is_file():
            with stage(folder) as staging:
                write_tiny(model, texts, chat_template, seed, staging)
    return folder


def write_tiny(model: ModelConfig, texts: list[str], chat_template: str, seed: int, staging: Path) -> None:
    """Fill a folder with the tokenizer and the weights."""
    tokenizer = train_tokenizer(texts, model.vocab_size)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(staging)
    control = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = LlamaForCausalLM(llama_config(model, **control))
    weights.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")],
        pad_token_id=tokenizer.pad_token_id,
    )
    weights.save_pretrained(staging)
    seal_card(
        staging,
        {"tokenizer_sha256": fingerprint_tokenizer(staging), "weights_sha256": fingerprint_weights(staging)},
    )


def llama_config(model: ModelConfig, **options: Any) -> LlamaConfig:
    """The Hugging Face configuration of a configured shape; `options` are what the shape does not say."""
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        max_position_embeddings=model.max_position_embeddings,
        tie_word_embeddings=model.tie_word_embeddings,
        **options,
    )


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens, control tokens among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def read_sample_texts(folder: Path) -> list[str]:
    """Every training text of the bundled sample: passages and dialogues."""
    texts = []
    for file in sorted(folder.glob("*/train.jsonl")):
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                texts.append(row["text"] if isinstance(row, dict) else "\n".join(m["text"] for m in row))
    return texts
