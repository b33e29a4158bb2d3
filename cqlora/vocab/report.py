"""What a new vocabulary bought: counted on held-out text, before and after."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokenizers import Tokenizer

from cqlora.vocab.corpus import HAN_RUN
from cqlora.vocab.parity import share_changed

_ENGLISH_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class VocabReport:
    """`vocab_report.json`. Counts are on text that the pieces were not learned from."""

    kind: str
    pieces_added: int
    control_tokens_added: int
    padding_rows: int
    tokens: int
    """Ids in use after the extension."""
    matrix_rows: int
    unreachable_pieces: int
    """New pieces that their own text is not segmented into."""
    chinese_characters: int
    tokens_per_chinese_character_before: float
    tokens_per_chinese_character_after: float
    """Over runs of Chinese characters."""
    english_words: int
    tokens_per_english_word_before: float
    tokens_per_english_word_after: float
    english_tokens_changed: float
    """Share of the tokens of English text that are segmented otherwise than before."""
    texts_checked: int
    longest_pieces: list[str]
    most_used_pieces: list[str]

    def table(self) -> str:
        """The report as people read it."""
        chinese = (self.tokens_per_chinese_character_before, self.tokens_per_chinese_character_after)
        english = (self.tokens_per_english_word_before, self.tokens_per_english_word_after)
        rows = [
            ("", "before", "after"),
            ("tokens per Chinese character", f"{chinese[0]:.3f}", f"{chinese[1]:.3f}"),
            ("tokens per English word", f"{english[0]:.3f}", f"{english[1]:.3f}"),
            (
                "tokens",
                f"{self.tokens - self.pieces_added - self.control_tokens_added:,}",
                f"{self.tokens:,}",
            ),
        ]
        lines = [f"{name:30}{before:>10}{after:>10}" for name, before, after in rows]
        lines += [
            f"{self.pieces_added:,} pieces and {self.control_tokens_added} control tokens added, "
            f"{self.padding_rows} rows of padding, {self.matrix_rows:,} rows in all",
            f"counted on {self.chinese_characters:,} Chinese characters and {self.english_words:,} English "
            f"words; {self.english_tokens_changed:.2%} of English tokens changed; "
            f"{self.texts_checked:,} texts checked",
            f"longest: {' '.join(self.longest_pieces)}",
            f"most used: {' '.join(self.most_used_pieces)}",
        ]
        if self.unreachable_pieces:
            lines.insert(-2, f"{self.unreachable_pieces:,} pieces that no segmentation reaches")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def count_chinese(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[int, int]:
    """Chinese characters in runs of them, and the tokens that these are encoded as."""
    runs = [run for text in texts for run in HAN_RUN.findall(text)]
    encodings = tokenizer.encode_batch_fast(runs, add_special_tokens=False)
    # A SentencePiece model puts a space before a text's first word; inside a text there is none.
    space = tokenizer.token_to_id("▁")
    spaces = sum(e.ids[:1] == [space] for e in encodings)
    return sum(map(len, runs)), sum(len(e.ids) for e in encodings) - spaces


def count_english(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[int, int]:
    """English words in texts, and all the tokens of the texts."""
    words = sum(len(_ENGLISH_WORD.findall(text)) for text in texts)
    return words, sum(len(e.ids) for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False))


def english_part(text: str) -> str:
    """The lines of a text that have no Chinese character."""
    return "\n".join(line for line in text.split("\n") if not HAN_RUN.search(line))


def most_used(tokenizer: Tokenizer, texts: Sequence[str], new_ids: range) -> list[int]:
    """Ids of the new pieces that the texts use most, most used first."""
    counts: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
        counts.update(token_id for token_id in encoding.ids if token_id in new_ids)
    return [token_id for token_id, _ in counts.most_common(_SHOWN)]


def count_vocabulary(
    before: Tokenizer, after: Tokenizer, held_out: Sequence[str], english: Sequence[str], new_ids: range
) -> dict[str, Any]:
    """The report's counts on Chinese and on English text."""
    characters, chinese_before = count_chinese(before, held_out)
    words, english_before = count_english(before, english)
    spelled = [spell(after, token_id) for token_id in new_ids]
    readable = [piece for piece in spelled if "\ufffd" not in piece]
    return {
        "chinese_characters": characters,
        "tokens_per_chinese_character_before": chinese_before / max(1, characters),
        "tokens_per_chinese_character_after": count_chinese(after, held_out)[1] / max(1, characters),
        "english_words": words,
        "tokens_per_english_word_before": english_before / max(1, words),
        "tokens_per_english_word_after": count_english(after, english)[1] / max(1, words),
        "english_tokens_changed": share_changed(before, after, english),
        "longest_pieces": sorted(readable, key=lambda piece: (-len(piece), piece))[:_SHOWN],
        "most_used_pieces": [spell(after, token_id) for token_id in most_used(after, held_out, new_ids)],
    }


def spell(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text, or as the tokenizer writes it where it is a part of a character."""
    return tokenizer.decode([token_id]) or str(tokenizer.id_to_token(token_id))
