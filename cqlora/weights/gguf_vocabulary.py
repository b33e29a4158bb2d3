"""A model folder's tokenizer under GGUF's names, a token for every row of the embedding matrix."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cqlora.data.templates import read_own_template
from cqlora.data.tokenizer import parse_tokenizer
from cqlora.errors import ModelError
from cqlora.system.documents import read_text
from cqlora.vocab.files import TokenizerFiles, read_tokenizer_files
from cqlora.weights.gguf_tokenizer import CONTROL, USER_DEFINED, split_qwen2, split_rules

NORMAL, UNUSED = 1, 5


def add_vocabulary(writer: Any, folder: Path, config: dict[str, Any], template: str = "") -> None:
    """Give a GGUF writer a folder's tokenizer, special tokens and chat template, or another template.

    Raises:
        ModelError: a tokenizer that is no LLaMA's, or that splits text by a rule llama.cpp has no known name for.
    """
    files = read_tokenizer_files(folder)
    rows = config["vocab_size"]
    if files.size > rows:
        raise ModelError(f"{folder} has {files.size} tokens and {rows} rows for them; give a base whose two agree.")
    if files.pieces is None:
        add_byte_level(writer, files, rows)
    else:
        add_pieces(writer, files, rows)
    for kind in ("bos", "eos", "pad"):
        token_id = config.get(f"{kind}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{kind}_token_id")(token_id[0] if isinstance(token_id, list) else token_id)
    writer.add_add_bos_token(begins_with(folder, config.get("bos_token_id")))
    template = template or read_own_template(folder)
    if template:
        writer.add_chat_template(template)


def add_byte_level(writer: Any, files: TokenizerFiles, rows: int) -> None:
    """A byte-level BPE: tokens, their kinds, merges and the name of the splitting rule."""
    tokens, types = pad_tokens({token_id: (token, NORMAL) for token, token_id in files.vocab.items()}, files, rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name_split_rule(files))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = files.document["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])


def add_pieces(writer: Any, files: TokenizerFiles, rows: int) -> None:
    """A SentencePiece BPE: pieces, scores and kinds, which ggml numbers as SentencePiece does."""
    pieces = files.pieces.pieces
    tokens, types = pad_tokens({i: (piece.piece, piece.type) for i, piece in enumerate(pieces)}, files, rows)
    spec = files.pieces.normalizer_spec
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([piece.score for piece in pieces] + [0.0] * (rows - len(pieces)))
    writer.add_token_types(types)
    writer.add_add_space_prefix(spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(spec.remove_extra_whitespaces)


def pad_tokens(known: dict[int, tuple[str, int]], files: TokenizerFiles, rows: int) -> tuple[list[str], list[int]]:
    """Token and kind of every row; rows that no token uses get names that no text has."""
    for token in files.document["added_tokens"]:
        kind = known.get(token["id"], ("", NORMAL))[1]
        by_flag = CONTROL if token["special"] else USER_DEFINED
        known[token["id"]] = (token["content"], kind if kind not in (NORMAL, USER_DEFINED) else by_flag)
    columns = [known.get(row, (f"[PAD{row}]", UNUSED)) for row in range(rows)]
    return [token for token, _ in columns], [kind for _, kind in columns]


def name_split_rule(files: TokenizerFiles) -> str:
    """llama.cpp's name of the rule by which a byte-level BPE splits text before merging."""
    actual = _significant(files.document["pre_tokenizer"])
    for name, rule in (split_rules() | {"qwen2": split_qwen2()}).items():
        tokenizer = Tokenizer.from_str('{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}')
        tokenizer.pre_tokenizer = rule
        if _significant(json.loads(tokenizer.to_str())["pre_tokenizer"]) == actual:
            return name
    raise ModelError(
        f"{files.folder} splits text by a rule that has no known name in GGUF files; use format=safetensors."
    )


def begins_with(folder: Path, bos: int | None) -> bool:
    """Whether the tokenizer puts the beginning-of-text token before a text."""
    return parse_tokenizer(read_text(folder / "tokenizer.json"), folder).encode("a").ids[:1] == [bos]


def _significant(rule: dict[str, Any]) -> Any:
    """What of a pre-tokenizer's JSON decides where it splits; offsets do not."""
    kept = {key: value for key, value in rule.items() if key != "trim_offsets"}
    return kept | {"pretokenizers": [_significant(part) for part in rule.get("pretokenizers", [])]}
