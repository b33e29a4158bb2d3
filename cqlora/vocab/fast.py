"""Write the fast tokenizer (`tokenizer.json`) of a SentencePiece model or of Llama 3's rank file."""

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cqlora.data.byte_level import byte_letters
from cqlora.errors import ModelError
from cqlora.system.documents import write_json
from cqlora.vocab.files import PIECE_MODEL, read_piece_model
from cqlora.vocab.merge import piece_merges

_KIND = sentencepiece_model_pb2.ModelProto.SentencePiece
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text before merging (meta-llama/llama3, tokenizer.py)."""

_LLAMA3_NAMED = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_LLAMA31_NAMED = _LLAMA3_NAMED | {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
LLAMA3_SPECIALS = 256


def write_piece_tokenizer(proto: Any, folder: Path, max_length: int) -> dict[str, int]:
    """Write a SentencePiece BPE as tokenizer.model, tokenizer.json and its settings; return special ids.

    Raises:
        ModelError: a unigram model, or one with a normalisation of its own, which LLaMA's does not have.
    """
    bpe = sentencepiece_model_pb2.TrainerSpec.BPE
    if proto.trainer_spec.model_type != bpe or proto.normalizer_spec.name not in ("identity", ""):
        raise ModelError(
            f"the {PIECE_MODEL} is not a BPE model without normalisation, as LLaMA's is; give the "
            "tokenizer.model that belongs to the weights."
        )
    control = [(i, piece.piece) for i, piece in enumerate(proto.pieces) if piece.type in (_KIND.CONTROL, _KIND.UNKNOWN)]
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    names = {"unk": _first(proto, _KIND.UNKNOWN), "bos": "<s>", "eos": "</s>"}
    tokenizer = Tokenizer(
        models.BPE(vocab, piece_merges(proto), unk_token=names["unk"], fuse_unk=True, byte_fallback=True)
    )
    prefix = proto.normalizer_spec.add_dummy_prefix
    # Not Metaspace: that puts no space before a text that begins with one, where SentencePiece does.
    rules = [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    rules = rules if proto.normalizer_spec.remove_extra_whitespaces else []
    rules += [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*rules, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for _, piece in control])
    _begin_with(tokenizer, "<s>", vocab["<s>"])
    (folder / PIECE_MODEL).write_bytes(proto.SerializeToString())
    settings = {f"{kind}_token": name for kind, name in names.items()}
    _save(tokenizer, folder, settings, max_length)
    return {f"{kind}_token_id": vocab[names[kind]] for kind in ("bos", "eos")}


def write_rank_tokenizer(file: Path, folder: Path, max_length: int, llama31: bool) -> dict[str, int]:
    """Write Llama 3's rank file as tokenizer.json and tokenizer_config.json; return special ids.

    Raises:
        ModelError: the file is no list of base64 tokens and ranks.
    """
    ranks = read_ranks(file)
    spell = byte_letters()
    vocab = {"".join(spell[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = [
        ("".join(spell[byte] for byte in left), "".join(spell[byte] for byte in right))
        for left, right in rank_merges(ranks)
    ]
    # Llama 3's own tokenizer looks a whole word up before it merges.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    specials = llama3_specials(llama31)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    _begin_with(tokenizer, bos, len(ranks))
    settings = {"bos_token": bos, "eos_token": eos}
    _save(tokenizer, folder, settings, max_length)
    return {"bos_token_id": len(ranks), "eos_token_id": len(ranks) + 1}


def read_ranks(file: Path) -> dict[bytes, int]:
    """Tokens and their ranks out of a tiktoken file, a base64 token and a number a line."""
    ranks = {}
    try:
        for line in file.read_bytes().splitlines():
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise ModelError(f"{file} is no tiktoken rank file ({error}); fetch it again.") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ModelError(f"{file} has ranks that are not 0 to {len(ranks) - 1}; fetch it again.")
    return ranks


def rank_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """For each token longer than a byte the pair that it is merged from, in the order of ranks.

    The pair is what merging by lower ranks alone leaves of the token (openai/tiktoken, _educational.py).
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _merge_below(ranks, token, rank)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def llama3_specials(llama31: bool) -> list[str]:
    """The 256 control tokens behind Llama 3's ranks (meta-llama/llama-models, tokenizer.py)."""
    named = _LLAMA31_NAMED if llama31 else _LLAMA3_NAMED
    names, reserved = [], 0
    for place in range(LLAMA3_SPECIALS):
        if place in named:
            names.append(f"<|{named[place]}|>")
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return names


def is_rank_file(file: Path) -> bool:
    """Whether a `tokenizer.model` is a tiktoken rank file and no SentencePiece model."""
    with file.open("rb") as stream:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", stream.readline().strip()) is not None


def write_meta_tokenizer(file: Path, folder: Path, max_length: int, llama31: bool) -> dict[str, int]:
    """Write either kind of Meta's `tokenizer.model`; return special ids."""
    if is_rank_file(file):
        return write_rank_tokenizer(file, folder, max_length, llama31)
    return write_piece_tokenizer(read_piece_model(file), folder, max_length)


def _merge_below(ranks: dict[bytes, int], token: bytes, limit: int) -> list[bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        candidates = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        rank, place = min(candidates)
        if rank >= limit:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _begin_with(tokenizer: Tokenizer, bos: str, bos_id: int) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )


def _first(proto: Any, kind: int) -> str:
    return next(str(piece.piece) for piece in proto.pieces if piece.type == kind)


def _save(tokenizer: Tokenizer, folder: Path, settings: dict[str, str], max_length: int) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    common = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings | common)
