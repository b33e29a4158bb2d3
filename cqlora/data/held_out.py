"""Held-out documents as text, whole and in a fair order, whatever vocabulary is to read them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cqlora.config.choices import LANGUAGES, SourceKind
from cqlora.config.schema import DataConfig, SourceConfig
from cqlora.data.build import ReportProgress, gather_sources, sample_sizes
from cqlora.data.clean import mend_surrogates
from cqlora.data.collect import Gathered, parse_row
from cqlora.data.keys import mix_keys
from cqlora.data.language import detect_language
from cqlora.data.mix import VAL, Chosen, choose_records, drop_near_duplicates
from cqlora.data.records import Document, RowDropped, RowError, load_record
from cqlora.data.sources import find_sources, read_rows
from cqlora.data.sources.location import Location, list_files
from cqlora.data.workers import Workers
from cqlora.errors import DataError


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """Documents of one source in one language."""

    source: str
    language: str
    """`zh`, `en` or `mixed`."""
    documents: list[str]

    @property
    def characters(self) -> int:
        """Of all documents."""
        return sum(map(len, self.documents))

    @property
    def bytes(self) -> int:
        """Of all documents, in UTF-8."""
        return sum(len(document.encode()) for document in self.documents)


def read_validation(data: DataConfig, seed: int, characters: int, progress: ReportProgress) -> list[HeldOutText]:
    """What a data group holds out of a run's training, as the run's own cleaning leaves it.

    Documents of a source and language are taken whole, in the order of a hash, until they have `characters` (0: all),
    so that the text does not depend on a vocabulary. With the run's seed none of them is one that it trained on.

    Raises:
        DataError: a source is missing or cannot be read, or nothing is held out.
    """
    locations = find_sources(data, "pretrain")
    # Budgets in tokens are a vocabulary's own, and of training text alone.
    data = replace(data, sources={name: replace(data.sources[name], sample_tokens=None) for name in locations})
    sizes = sample_sizes(data, list(locations))
    with TemporaryDirectory(prefix="cqlora-held-out-") as folder, Workers(1) as workers:
        staging = Path(folder)
        gathered = gather_sources(data, locations, sizes, seed, staging, staging / "rejected.jsonl", workers, progress)

        def drop_near(chosen: list[Chosen]) -> None:
            drop_near_duplicates(chosen, data, staging, workers, lambda done: progress("comparing", done, None))

        chosen = choose_records(gathered, data, sizes, seed, _count_no_tokens, drop_near)
        found = [text for each in chosen for text in take_validation(each, characters)]
    if not found:
        raise DataError(
            f"data={data.name} holds no document out of training; raise data.val_fraction, choose another data, or "
            "give files=[FILE]."
        )
    return found


def take_validation(chosen: Chosen, characters: int) -> list[HeldOutText]:
    """A source's documents for validation, by language."""
    index = chosen.gathered.index
    numbers = np.flatnonzero(chosen.kept & (chosen.splits == VAL))
    numbers = numbers[np.argsort(mix_keys(index["key"][numbers], "evaluation"), kind="stable")]
    found: dict[str, list[str]] = {}
    with chosen.gathered.spool.open("rb") as spool:
        for offset, length, language in index[["offset", "length", "language"]][numbers].tolist():
            spool.seek(offset)
            record = load_record(spool.read(length))
            if isinstance(record, Document):
                found.setdefault(LANGUAGES[language], []).append(record.text)
    name = chosen.gathered.name
    return [HeldOutText(name, language, take_whole(texts, characters)) for language, texts in sorted(found.items())]


def read_files(files: list[str], separator: str, characters: int) -> list[HeldOutText]:
    """The documents of files, as they lie there, each file a source by its name and each document in its language.

    Args:
        files: plain text, or rows with a `text` field; compressed or not.
        separator: what stands between two documents of a plain file; empty takes a file as one document.
        characters: to take of each source and language, in whole documents; 0 takes all.

    Raises:
        DataError: a file is missing or cannot be read, or two have one name.
    """
    names = [Path(file).name.partition(".")[0] for file in files]
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated:
        raise DataError(f"files= names two files {repeated}, and sources are told apart by name; rename one.")
    return [
        text for name, file in zip(names, files, strict=True) for text in read_one(name, file, separator, characters)
    ]


def read_one(name: str, file: str, separator: str, characters: int) -> list[HeldOutText]:
    """The documents of one file or folder, by language."""
    source = SourceConfig(kind=SourceKind.text, separator=separator)
    location = Location(files=list_files(Path(file), "files", source.kind), name=name)
    found: dict[str, list[str]] = {}
    for row in read_rows(location, source):
        try:
            documents = [each for each in parse_row(row, source, Counter()) if isinstance(each, Document)]
            texts = [mend_surrogates(document.text) for document in documents]
        except (RowError, RowDropped) as error:
            raise DataError(f"{row.file}, line {row.line}: {error}; mend the row or take it out.") from error
        for text in filter(None, texts):
            found.setdefault(detect_language(text), []).append(text)
    if not found:
        raise DataError(f"files={file} holds no text; give a file with at least one document.")
    return [HeldOutText(name, language, take_whole(texts, characters)) for language, texts in sorted(found.items())]


def take_whole(documents: Iterable[str], characters: int) -> list[str]:
    """The first documents that have `characters` together, none of them cut; 0 takes all."""
    taken, total = [], 0
    for document in documents:
        if characters and total >= characters:
            break
        taken.append(document)
        total += len(document)
    return taken


def _count_no_tokens(gathered: Gathered, numbers: np.ndarray) -> np.ndarray:
    """Nothing asks for tokens where no source has a budget of them."""
    raise AssertionError("a source has a budget of tokens")
