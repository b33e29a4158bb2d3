"""Learn new pieces from Chinese words: merges on top of a byte-level BPE, or a SentencePiece model."""

import io
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, trainers

from cqlora.errors import DataError

MAX_SUBPIECES = 16
"""Longest learned piece, in pieces of the base (byte-level BPE) or in characters (SentencePiece)."""

_FIRST_STAND_IN = 0x10000
_BATCH_WORDS = 20_000


def learn_merges(tokenizer: Tokenizer, words: Iterable[str], size: int, min_frequency: int) -> list[tuple[str, str]]:
    """Merges that continue a byte-level BPE where its own end, most frequent pair first.

    A word is first segmented by the base; each of its pieces then stands as one letter in the alphabet of a
    second BPE, whose merges are the base's continuation. Text to which none of them applies is segmented as
    before. Returns at most as many merges as make `size` new pieces.
    """
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    piece_of = {token_id: piece for piece, token_id in vocab.items()}
    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        # Two merges may make one piece, so some more are learned and the surplus is cut below.
        vocab_size=len(vocab) + size + size // 4 + 100,
        min_frequency=min_frequency,
        initial_alphabet=[chr(_FIRST_STAND_IN + token_id) for token_id in piece_of],
        max_token_length=MAX_SUBPIECES,
        show_progress=False,
    )
    learner.train_from_iterator(_stand_ins(tokenizer, halve_spaces(words)), trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    merges: list[tuple[str, str]] = []
    new: set[str] = set()
    for left, right in learned:
        pair = tuple("".join(piece_of[ord(letter) - _FIRST_STAND_IN] for letter in side) for side in (left, right))
        piece = "".join(pair)
        if len(new) == size and piece not in new:
            break
        if piece not in vocab:
            new.add(piece)
        merges.append((pair[0], pair[1]))
    return merges


def halve_spaces(words: Iterable[str]) -> Iterator[str]:
    """Take the leading space from every second word that has one.

    Where Chinese often follows spaces (between Latin words), as many pieces would else be learned with a
    space as without. Halved, text without spaces gains more than text with them loses (docs/vocabulary.md).
    """
    keep = False
    for word in words:
        if word.startswith(" "):
            keep = not keep
            yield word if keep else word[1:]
        else:
            yield word


def spell_characters(tokenizer: Tokenizer, characters: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that make each character one piece of a byte-level BPE, for those that are several."""
    merges: dict[tuple[str, str], None] = {}
    for character in characters:
        whole, *rest = tokenizer.encode(character, add_special_tokens=False).tokens
        for piece in rest:
            merges[(whole, piece)] = None
            whole += piece
    return list(merges)


def train_sentencepiece(words: Iterable[str], size: int) -> Any:
    """The ModelProto of a SentencePiece BPE of at most `size` pieces, learned from words without spaces.

    Raises:
        DataError: the words are too few to learn anything from.
    """
    model = io.BytesIO()
    sentences = (word.strip() for word in words)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=0.9998,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentencepiece_length=MAX_SUBPIECES,
            num_threads=2,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"SentencePiece could not learn {size} pieces ({str(error).splitlines()[-1]}); lower vocab.size "
            "or give more text as vocab.corpus."
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    return proto


def _stand_ins(tokenizer: Tokenizer, words: Iterable[str]) -> Iterator[str]:
    """Each word as a string in which a letter stands for a piece of the base."""
    for batch in batched_words(words):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield "".join(chr(_FIRST_STAND_IN + token_id) for token_id in encoding.ids)


def batched_words(words: Iterable[str]) -> Iterator[list[str]]:
    """Words in lists that a batch encoder takes well."""
    stream = iter(words)
    while batch := list(islice(stream, _BATCH_WORDS)):
        yield batch
