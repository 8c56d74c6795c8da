"""The shipped corpus and larger real ones: counts that are known from elsewhere, and the report's plausibility."""

import lzma
from pathlib import Path

import numpy as np
import pytest

from largebatch.data import Corpus, PretrainingInstances, prepare, unigram_entropy
from largebatch.data.blocks import read_blocks
from largebatch.data.documents import documents_of
from largebatch.data.sources import find_sources


def test_the_shipped_corpus_is_1344_documents_under_its_licence(demo_text: Path) -> None:
    """Found as the demo finds it, by its directory; no distributor's name is left in the text."""
    sources = find_sources([demo_text.parent])
    assert [source.path for source in sources] == [demo_text]
    documents = [d for block in read_blocks(sources, "text") for piece in block for d in documents_of(piece, "text")]
    assert len(documents) == 1344
    assert min(sum(map(len, document)) for document in documents) > 2000
    text = demo_text.parent / "LICENSE"
    assert "public domain" in text.read_text()
    assert not any("Gutenberg" in paragraph for document in documents for paragraph in document)
    assert demo_text.stat().st_size < 4 << 20
    readme = (demo_text.parent / "README.md").read_text()
    per_book = [
        int(row.split("|")[4])
        for row in readme.splitlines()
        if row.startswith("| ") and row.split("|")[4].strip().isdigit()
    ]
    assert sum(per_book) == 1344


@pytest.mark.slow
def test_the_shipped_corpus_prepares_as_the_demo_does(demo_text: Path, tmp_path: Path) -> None:
    """A vocabulary of 8,192, no unknown token to speak of, and a unigram entropy between 6 and 7 nats (ln 8192 = 9)."""
    manifest = prepare([demo_text.parent], tmp_path / "out", vocab_size=8192, heldout=0.05)
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.vocab_size == 8192
    assert manifest.report["unknown_rate"] < 1e-4
    assert 2.5e6 < manifest.report["tokens"] < 3.2e6
    assert 40 <= manifest.report["documents"]["heldout"] <= 95
    assert 6 < unigram_entropy(corpus) < 7
    assert corpus.split("heldout").num_tokens > 50_000


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_documents"), [("boolq_passages", 12266), ("sotu", 249), ("brown", 500)])
def test_document_counts_of_known_corpora(shared_data: Path, tmp_path: Path, name: str, num_documents: int) -> None:
    """The counts that come with the files; characters against the decompressed text, white space aside."""
    path = shared_data / "text" / f"{name}.txt.xz"
    manifest = prepare([path], tmp_path / "out", vocab_size=4000)
    documents = manifest.report["documents"]
    assert documents["read"] == num_documents
    assert documents["train"] + documents["heldout"] + documents["duplicate"] == num_documents
    text = lzma.decompress(path.read_bytes()).decode()
    joined = "\n\n".join(
        "\n".join(" ".join(line.split()) for line in d.split("\n")) for d in text.strip().split("\n\n")
    )
    assert manifest.report["characters"] == len(joined) - 2 * (num_documents - 1)
    assert manifest.report["unknown_rate"] < 0.005
    train = Corpus.open(tmp_path / "out").split("train")
    instances = PretrainingInstances(train, 128, seed=0)
    batch = instances.batch(0, np.arange(instances.num_instances(0)))
    # A short document in ten and a random half of the pairs; with lone sentences more than half.
    assert 0.45 < batch["next_sentence_labels"].mean() < 0.75
    assert 0.5 < batch["lengths"].mean() / 128 < 1
