"""The tokenizer inside a GGUF file, written as `tokenizer.json` and `tokenizer_config.json`.

A byte-level BPE's rule for splitting text before merging is named, not stored, by `tokenizer.ggml.pre`; only
the rules written here are known, since a wrong one gives wrong ids silently.
"""

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from cqlora.errors import ModelError
from cqlora.system.documents import write_json
from cqlora.vocab.fast import LLAMA3_SPLIT, write_piece_tokenizer
from cqlora.weights.gguf import GgufModel, described_as_damage

CONTROL, USER_DEFINED = 3, 4


def write_gguf_tokenizer(model: GgufModel, folder: Path) -> None:
    """Write a GGUF file's tokenizer, its control tokens and its chat template.

    Raises:
        ModelError: the file's tokenizer is of another kind, or splits text by a rule unknown here.
    """
    with described_as_damage(model.file):
        _write(model, folder)


def _write(model: GgufModel, folder: Path) -> None:
    if model.field("tokenizer.ggml.model") == "llama":
        write_piece_tokenizer(piece_model(model), folder, int(model.field("llama.context_length")))
        return
    kind, rule = model.field("tokenizer.ggml.model"), model.field("tokenizer.ggml.pre", "default")
    rules = split_rules()
    if kind != "gpt2" or rule not in rules:
        raise ModelError(
            f"{model.file} has a tokenizer of kind {kind!r}, rule {rule!r}; use a GGUF file of kind 'llama', "
            f"or of kind 'gpt2' and rule {', '.join(rules)}, or the model's Hugging Face folder."
        )
    pieces = model.needed("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in model.needed("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = rules[rule]
    tokenizer.decoder = decoders.ByteLevel()
    types = model.field("tokenizer.ggml.token_type")
    added = [(piece, kind) for piece, kind in zip(pieces, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=kind == CONTROL, normalized=False) for piece, kind in added]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(model, pieces))


def piece_model(model: GgufModel) -> Any:
    """The SentencePiece ModelProto that a GGUF file's pieces, scores and types were taken from."""
    proto = sentencepiece_model_pb2.ModelProto()
    columns = [model.field(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")]
    for piece, score, kind in zip(*columns, strict=True):
        # ggml numbers the types as SentencePiece does: 1 normal, 2 unknown, 3 control, 4 user, 6 byte.
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = bool(model.field("tokenizer.ggml.add_space_prefix", True))
    proto.normalizer_spec.remove_extra_whitespaces = bool(model.field("tokenizer.ggml.remove_extra_whitespaces", False))
    return proto


def split_rules() -> dict[str, Any]:
    """The known rules of splitting text before it is merged, by the names that llama.cpp gives them."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split_llama3 = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "llama-bpe": pre_tokenizers.Sequence([split_llama3, bytes_only]),
    }


def split_qwen2() -> Any:
    """Qwen's rule, which llama.cpp calls qwen2: Llama 3's but for digits, which stand alone.

    It is written and not read: Qwen's tokenizers normalise text to NFC first, which a GGUF file does not say.
    """
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _tokenizer_config(model: GgufModel, pieces: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(model.field("llama.context_length")),
        "clean_up_tokenization_spaces": False,
    }
    for key, token_id in model.special_ids().items():
        config[key.removesuffix("_id")] = pieces[token_id]
    template = model.field("tokenizer.chat_template")
    return config | ({"chat_template": template} if template else {})
