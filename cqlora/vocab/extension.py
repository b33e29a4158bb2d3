"""Extend a tokenizer: choose new pieces, merge them, add control tokens, check, report."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from cqlora.errors import ConfigError
from cqlora.system.documents import write_json
from cqlora.vocab.config import CONTROL_TOKENS, PAD_TOKEN, VocabConfig, VocabKind
from cqlora.vocab.corpus import Corpus, chinese_words, count_han, open_corpus
from cqlora.vocab.files import TokenizerFiles, read_piece_model, read_tokenizer_files
from cqlora.vocab.merge import (
    add_control_tokens,
    append_merges,
    cjk_characters,
    merge_pieces,
    mergeable_pieces,
)
from cqlora.vocab.parity import check_parity
from cqlora.vocab.report import VocabReport, count_vocabulary, english_part
from cqlora.vocab.rows import NewTokens
from cqlora.vocab.train import learn_merges, spell_characters, train_sentencepiece

REPORT = "vocab_report.json"
MAX_CHECKED_CHARACTERS = 5_000_000
MIN_ENGLISH_CHARACTERS = 20


@dataclass(frozen=True, slots=True)
class Extension:
    """What an extended tokenizer asks of the embedding matrices."""

    first_row: int
    """Row of the first new token; the rows before it belong to the base's tokens."""
    new: NewTokens
    matrix_rows: int
    """Rows of the extended matrices, padding included."""
    pad_token_id: int | None
    turn_end_id: int | None
    report: VocabReport

    @property
    def padding_rows(self) -> int:
        """Rows behind the last token that no token uses."""
        return self.matrix_rows - self.first_row - len(self.new)


def extend_tokenizer(base: Path, output: Path, vocab: VocabConfig, matrix_rows: int) -> Extension:
    """Write the extended tokenizer of `base` and its report into `output`; `matrix_rows` are the base's.

    Raises:
        ConfigError: a kind of vocabulary that the base's kind of tokenizer cannot take.
        DataError: a corpus that is missing or too small.
        ModelError: a tokenizer that cannot be extended, or a merge that fails its checks.
    """
    files = read_tokenizer_files(base)
    before, first_row = files.build(), files.size
    corpus = open_corpus(vocab.corpus, vocab.held_out_fraction)
    pieces = add_pieces(files, before, corpus, vocab)
    control = add_control_tokens(files, CONTROL_TOKENS, PAD_TOKEN) if vocab.control_tokens else []
    files.write(output)
    after = read_tokenizer_files(output).build()
    subpieces = [piece_ids(before, piece) for piece in pieces]
    subpieces += [before.encode(token, add_special_tokens=False).ids for token in control]
    new = NewTokens(subpieces, len(pieces), chinese_tokens(before, first_row))
    rows = max(matrix_rows, -(-files.size // vocab.pad_to_multiple_of) * vocab.pad_to_multiple_of)
    held_out, bundled = take_texts(corpus.split(held_out=True)), list(open_corpus([], 0.0).documents())
    checked = take_texts(corpus.documents()) + (bundled if vocab.corpus else [])
    english = [part for text in (*held_out, *bundled) if len(part := english_part(text)) >= MIN_ENGLISH_CHARACTERS]
    report = VocabReport(
        kind=resolve_kind(files, vocab).name,
        pieces_added=len(pieces),
        control_tokens_added=len(control),
        padding_rows=rows - files.size,
        tokens=files.size,
        matrix_rows=rows,
        unreachable_pieces=sum(len(after.model.tokenize(piece)) > 1 for piece in pieces),
        texts_checked=check_parity(files, after, checked),
        **count_vocabulary(before, after, held_out, english, range(first_row, first_row + len(pieces))),
    )
    write_json(output / REPORT, report.as_json())
    end, pad = (after.token_to_id(token) for token in ("<|im_end|>", files.settings.get("pad_token") or ""))
    return Extension(first_row, new, rows, pad, end, report)


def resolve_kind(files: TokenizerFiles, vocab: VocabConfig) -> VocabKind:
    """The kind of vocabulary to add, fit for the base's kind of tokenizer."""
    byte_level = files.pieces is None
    if vocab.kind is VocabKind.auto:
        return VocabKind.bpe if byte_level else VocabKind.sentencepiece
    if byte_level and vocab.kind in (VocabKind.sentencepiece, VocabKind.path):
        raise ConfigError(f"vocab={vocab.kind.name}, but {files.folder} has a byte-level BPE; use vocab=bpe.")
    if not byte_level and vocab.kind is VocabKind.bpe:
        raise ConfigError(f"vocab=bpe, but {files.folder} has a SentencePiece model; use vocab=sentencepiece.")
    return vocab.kind


def add_pieces(files: TokenizerFiles, before: Tokenizer, corpus: Corpus, vocab: VocabConfig) -> list[str]:
    """Learn or read new pieces and merge them; return those that are new, in the order of their ids."""
    kind = resolve_kind(files, vocab)
    if kind is VocabKind.none:
        return []
    if kind is VocabKind.cjk and files.pieces is None:
        return append_merges(files, spell_characters(before, cjk_characters()))
    if kind is VocabKind.cjk:
        return merge_pieces(files, cjk_characters())
    if kind is VocabKind.path:
        return merge_pieces(files, mergeable_pieces(read_piece_model(Path(vocab.model))))
    words = chinese_words(corpus, vocab.max_characters)
    if kind is VocabKind.bpe:
        return append_merges(files, learn_merges(before, words, vocab.size, vocab.min_frequency))
    return merge_pieces(files, mergeable_pieces(train_sentencepiece(words, vocab.size)))


def take_texts(documents: Iterable[str]) -> list[str]:
    """Documents up to a limit of characters, so that checks on a large corpus end."""
    texts: list[str] = []
    characters = 0
    for text in documents:
        texts.append(text)
        characters += len(text)
        if characters > MAX_CHECKED_CHARACTERS:
            break
    return texts


def chinese_tokens(before: Tokenizer, size: int) -> list[int]:
    """The base's tokens that hold a whole Chinese character."""
    return [
        token_id for token_id, text in enumerate(before.decode_batch([[i] for i in range(size)])) if count_han(text)
    ]


def piece_ids(before: Tokenizer, piece: str) -> list[int]:
    """The base's ids of a new piece, a leading space left out where others remain."""
    tokens = before.model.tokenize(piece)
    if len(tokens) > 1 and tokens[0].value == "▁":
        tokens = tokens[1:]
    return [token.id for token in tokens]
