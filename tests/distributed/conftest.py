"""A small corpus for the tests of whole runs."""

import lzma
from pathlib import Path

import pytest
import whole_runs

import largebatch
from largebatch.data import prepare

BOOKS = Path(largebatch.__file__).parent / "assets" / "demo_corpus" / "gutenberg.txt.xz"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 150 kB of the shipped books."""
    folder = tmp_path_factory.mktemp("text")
    with lzma.open(BOOKS, "rt", encoding="utf-8") as file:
        (folder / "books.txt").write_text(file.read(150_000))
    prepare([folder / "books.txt"], folder / "corpus", vocab_size=600, heldout=0.2, workers=1, progress=False)
    return folder / "corpus"


@pytest.fixture(scope="session")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    whole_runs.train(out, whole_runs.settings(corpus))
    return out
