"""Small synthetic corpora, in memory, whose tokens say where they came from."""

import lzma
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import largebatch.data
from largebatch.data import CorpusSplit, Vocabulary
from largebatch.data.vocabulary import SPECIAL_TOKENS

MakeSplit = Callable[..., tuple[CorpusSplit, list[list[list[int]]]]]


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """400 pieces, a third of which continue a word."""
    return Vocabulary((*SPECIAL_TOKENS, *(f"##p{i}" if i % 3 == 0 else f"w{i}" for i in range(395))))


@pytest.fixture(scope="session")
def make_split(vocabulary: Vocabulary) -> MakeSplit:
    def make(
        num_documents: int, max_sentences: int, max_tokens: int, seed: int = 0
    ) -> tuple[CorpusSplit, list[list[list[int]]]]:
        generator = np.random.default_rng(seed)
        documents = [
            [
                generator.integers(5, len(vocabulary), generator.integers(1, max_tokens + 1)).tolist()
                for _ in range(generator.integers(1, max_sentences + 1))
            ]
            for _ in range(num_documents)
        ]
        return CorpusSplit.from_documents(documents, vocabulary), documents

    return make


DEMO_TEXT = Path(largebatch.data.__file__).parent.parent / "assets" / "demo_corpus" / "gutenberg.txt.xz"


@pytest.fixture(scope="session")
def demo_text() -> Path:
    """The shipped corpus, one compressed text file."""
    return DEMO_TEXT


@pytest.fixture(scope="session")
def demo_documents() -> list[list[str]]:
    """The first 150 documents (of three novels) of the shipped corpus, as paragraphs."""
    with lzma.open(DEMO_TEXT, "rt", encoding="utf-8") as file:
        text = file.read(1_400_000)
    return [document.split("\n") for document in text.split("\n\n")[:150]]


@pytest.fixture(scope="session")
def demo_paragraphs(demo_documents: list[list[str]]) -> list[str]:
    return [paragraph for document in demo_documents for paragraph in document]


@pytest.fixture
def folder_of_nobody() -> Iterator[Path]:
    """A folder and a process that modes hold for: root, who may do everything, is somebody else meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        root = os.geteuid() == 0
        if root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)
            for path in Path(folder).rglob("*"):
                if path.is_dir():
                    path.chmod(0o700)
