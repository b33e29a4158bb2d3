"""Text to learn a vocabulary from: documents streamed out of files, and the Chinese words in them."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cqlora.config.choices import SourceKind
from cqlora.config.schema import DataConfig, SourceConfig
from cqlora.data.clean import mend_surrogates
from cqlora.data.records import RowError
from cqlora.data.sources import read_file
from cqlora.data.sources.files import decode_body
from cqlora.data.sources.location import SAMPLE_DIR, SourceFile, format_of, list_files
from cqlora.errors import DataError

logger = logging.getLogger(__name__)

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
HAN_RUN = re.compile(f"[{HAN}]+")
CHINESE_WORD = re.compile(f" ?[{HAN}]+| ?[\u3000-\u303f\uff00-\uff20\uff3b-\uff40\uff5b-\uff65‘’“”…—·]+")
"""A run of Chinese characters or of Chinese punctuation with the space before it, which byte-level BPE keeps
in one unit with it."""

_TEXT_FIELDS = (
    "title",
    "text",
    "content",
    "value",
    "instruction",
    "input",
    "output",
    "target",
    "conversations",
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents of some files; a file's name or a hash of the document decides what is held out."""

    files: list[SourceFile]
    held_out_fraction: float

    def documents(self) -> Iterator[str]:
        """Every document."""
        for file in self.files:
            yield from read_documents(file)

    def split(self, held_out: bool) -> Iterator[str]:
        """The documents to count on, or those to learn from; a file's name may say which (val.jsonl)."""
        for file in self.files:
            for document in read_documents(file):
                set_aside = file.split != "train" if file.split else is_held_out(document, self.held_out_fraction)
                if set_aside == held_out:
                    yield document


def open_corpus(paths: list[str], held_out_fraction: float) -> Corpus:
    """The files of `vocab.corpus`, or the text bundled with cqlora.

    Raises:
        DataError: a path that does not exist or holds no text.
    """
    folders = [Path(path) for path in paths] or [SAMPLE_DIR]
    files = [file for folder in folders for file in list_files(folder, "vocab.corpus", SourceKind.wiki)]
    return Corpus(files, held_out_fraction)


def read_documents(file: SourceFile) -> Iterator[str]:
    """The texts of one file: rows of any of the known shapes, or the lines of a plain file.

    Raises:
        DataError: more rows cannot be read than `data.max_rejected_fraction` would allow in training.
    """
    if format_of(file.path) == ".xml":
        raise DataError(f"vocab.corpus={file.path} is a MediaWiki dump; give JSON lines, Parquet or plain text.")
    rows, unreadable = 0, Counter[str]()
    for row in read_file(file, SourceConfig(kind=SourceKind.text, separator="\n")):
        rows += 1
        try:
            document = mend_surrogates("\n".join(texts_in(decode_body(row.body))))
        except RowError as error:
            unreadable[str(error)] += 1
            continue
        if document:
            yield document
    if unreadable:
        tell_unreadable(file.path, rows, unreadable)


@cache
def warn(note: str) -> None:
    """Say something of a corpus, which is read several times, once."""
    logger.warning(note)


def tell_unreadable(file: Path, rows: int, unreadable: Counter[str]) -> None:
    """Say what of a file was passed over, and why; raise DataError where that is too much of it."""
    reasons = ", ".join(f"{reason}: {count}" for reason, count in unreadable.most_common())
    told = f"vocab.corpus={file}: {unreadable.total():,} of {rows:,} rows cannot be read ({reasons})"
    if unreadable.total() > DataConfig().max_rejected_fraction * rows:
        raise DataError(f"{told}; mend them or leave the file out.")
    warn(f"{told} and are passed over")


def texts_in(body: Any) -> Iterator[str]:
    """The text of a row, whichever of the known fields hold it."""
    if isinstance(body, str):
        yield body
    elif isinstance(body, list):
        for part in body:
            yield from texts_in(part)
    elif isinstance(body, dict):
        for key in _TEXT_FIELDS:
            if key in body:
                yield from texts_in(body[key])


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document is set aside, decided by its words alone."""
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def chinese_words(corpus: Corpus, max_characters: int) -> Iterator[str]:
    """Chinese words of the documents to learn from, of evenly fewer where they hold too many characters.

    Raises:
        DataError: there is no Chinese character among them.
    """
    available = sum(map(count_han, corpus.split(held_out=False)))
    if not available:
        raise DataError(
            f"vocab.corpus={[str(file.path) for file in corpus.files]} holds no Chinese text to learn from; "
            "give files that do."
        )
    share = max_characters / available
    for document in corpus.split(held_out=False):
        if share >= 1 or is_held_out("sampled:" + document, share):
            yield from CHINESE_WORD.findall(document)


def count_han(text: str) -> int:
    """Chinese characters in a text."""
    return sum(map(len, HAN_RUN.findall(text)))
