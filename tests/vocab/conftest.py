"""Bases that several tests of a session read and none changes."""

from pathlib import Path

import pytest

from tests.vocab.bases import write_base, write_corpus


@pytest.fixture(scope="session")
def pieces_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a SentencePiece tokenizer, untied."""
    return write_base(tmp_path_factory.mktemp("pieces") / "base", "pieces")


@pytest.fixture(scope="session")
def ranks_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a byte-level BPE, tied."""
    return write_base(tmp_path_factory.mktemp("ranks") / "base", "ranks", tied=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")
