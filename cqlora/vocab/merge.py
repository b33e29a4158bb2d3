"""Put new pieces into a tokenizer so that text without them is segmented as before."""

from collections.abc import Iterable
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from cqlora.vocab.files import TokenizerFiles

_KIND = sentencepiece_model_pb2.ModelProto.SentencePiece
_SENTINEL_SCORE = -1e8
"""Some models give runs of spaces scores far below any learned one; they are no bound for new pieces."""


def cjk_characters() -> list[str]:
    """U+4E00–U+9FFF, the CJK Unified Ideographs."""
    return [chr(point) for point in range(0x4E00, 0xA000)]


def append_merges(files: TokenizerFiles, merges: Iterable[tuple[str, str]]) -> list[str]:
    """Append merges to a byte-level BPE behind its own; return the pieces that are new."""
    pin_added_tokens(files)
    own = files.document["model"]["merges"]
    as_text = bool(own) and isinstance(own[0], str)
    next_id, new = files.size, []
    for left, right in merges:
        piece = left + right
        if piece not in files.vocab:
            files.vocab[piece] = next_id
            next_id += 1
            new.append(piece)
        own.append(f"{left} {right}" if as_text else [left, right])
    return new


def pin_added_tokens(files: TokenizerFiles) -> None:
    """Give added tokens their ids among the pieces too.

    Where only `added_tokens` has them, tokenizers numbers them anew behind the highest piece when it loads the
    file, and pieces that follow them would move them.
    """
    for token in files.document["added_tokens"]:
        files.vocab.setdefault(token["content"], token["id"])


def merge_pieces(files: TokenizerFiles, pieces: Iterable[str]) -> list[str]:
    """Add pieces to a SentencePiece BPE with scores below its own; return those that are new."""
    proto = files.pieces
    known = {piece.piece for piece in proto.pieces}
    scores = [piece.score for piece in proto.pieces if piece.type == _KIND.NORMAL]
    lowest = min(score for score in scores if score > _SENTINEL_SCORE)
    new = []
    for piece in pieces:
        if piece not in known:
            known.add(piece)
            new.append(piece)
            proto.pieces.append(_KIND(piece=piece, score=lowest - len(new), type=_KIND.NORMAL))
    files.document["model"]["vocab"] = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    files.document["model"]["merges"] = [list(pair) for pair in piece_merges(proto)]
    return new


def mergeable_pieces(proto: Any) -> list[str]:
    """The pieces of a SentencePiece model that text is segmented into, without bytes or control pieces."""
    return [piece.piece for piece in proto.pieces if piece.type in (_KIND.NORMAL, _KIND.USER_DEFINED)]


def piece_merges(proto: Any) -> list[tuple[str, str]]:
    """The merges by which a BPE segments as SentencePiece does with these scores.

    SentencePiece joins the neighbours whose union has the highest score, whatever they are; so every way to
    cut a piece in two known ones is a merge, ranked by the piece (transformers' convert_slow_tokenizer.py).
    """
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == _KIND.NORMAL}
    ranked = sorted(ids, key=lambda piece: (-proto.pieces[ids[piece]].score, ids[piece]))
    merges = []
    for piece in ranked:
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        merges += sorted(known, key=lambda cut: (ids[cut[0]], ids[cut[1]]))
    return merges


def add_control_tokens(files: TokenizerFiles, tokens: Iterable[str], pad: str) -> list[str]:
    """Add control tokens that the tokenizer lacks, and a pad token of its own; return those that are new."""
    present = {token["content"] for token in files.document["added_tokens"]} | set(files.vocab)
    new = [token for token in (*tokens, pad) if token not in present]
    for token_id, token in enumerate(new, start=files.size):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        files.document["added_tokens"].append({"id": token_id, "content": token, **flags})
        if "added_tokens_decoder" in files.settings:
            files.settings["added_tokens_decoder"][str(token_id)] = {"content": token, **flags}
        if files.pieces is not None:
            files.pieces.pieces.append(_KIND(piece=token, score=0.0, type=_KIND.CONTROL))
    pin_added_tokens(files)
    files.settings["pad_token"] = pad
    files.settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return new
