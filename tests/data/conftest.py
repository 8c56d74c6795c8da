"""Small synthetic corpora, in memory, whose tokens say where they came from."""

from collections.abc import Callable

import numpy as np
import pytest

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
